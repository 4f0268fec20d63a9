"""The guard of float32 products, against each way of lowering their precision."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

from mergekit_ace.linalg import precision
from mergekit_ace.linalg.precision import require_full_float32
from tests.device.pretended import AVAILABLE, PretendedAccelerator

CPU = torch.device("cpu")


def lower_mkldnn() -> None:
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


LOWERED: dict[str, Callable[[], None]] = {
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
}
# Older versions of torch have no switch for each backend.
EACH_BACKEND = hasattr(torch.backends.mkldnn, "matmul")
if EACH_BACKEND:
    LOWERED |= {"mkldnn": lower_mkldnn}


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    precision._multiplies_in_full.cache_clear()
    yield
    torch.set_float32_matmul_precision("highest")
    precision._multiplies_in_full.cache_clear()


def test_full_precision_is_accepted() -> None:
    require_full_float32(CPU)


@pytest.mark.parametrize("how", LOWERED)
def test_a_lower_precision_is_refused_and_the_remedy_helps(how: str) -> None:
    LOWERED[how]()
    with pytest.raises(RuntimeError, match=r"Call torch.set_float32_matmul_precision\('highest'\)"):
        require_full_float32(CPU)
    torch.set_float32_matmul_precision("highest")
    require_full_float32(CPU)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: these settings cannot be taken back."""
    imports = "import torch\nfrom mergekit_ace.linalg import precision\n"
    return subprocess.run(
        [sys.executable, "-c", imports + code], capture_output=True, text=True, env=os.environ | environment
    )


@pytest.mark.skipif(not EACH_BACKEND, reason="this torch has one setting for all backends")
def test_what_other_devices_read_is_no_reason_to_refuse() -> None:
    done = run(
        "for backend in (torch.backends.cudnn.conv, torch.backends.cudnn, torch.backends.cuda.matmul):\n"
        "    backend.fp32_precision = 'tf32'\n"
        "    precision.require_full_float32(torch.device('cpu'))\n"
        "    print(precision._lowered_setting(torch.device('cuda:0')))\n"
        "    backend.fp32_precision = 'none'\n"
    )
    assert done.returncode == 0, done.stderr
    of_convolutions, of_cudnn, of_products = done.stdout.splitlines()
    # cuDNN's setting for all of its operations is cuBLAS's too.
    assert of_convolutions == "None"
    assert "cuda.matmul.fp32_precision = 'tf32'" in of_cudnn
    assert "cuda.matmul.fp32_precision = 'tf32'" in of_products


def test_torchs_variable_is_named_with_what_undoes_it() -> None:
    done = run("precision.require_full_float32(torch.device('cpu'))", TORCH_ALLOW_TF32_CUBLAS_OVERRIDE="1")
    assert done.returncode == 1
    assert "has TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1: run `unset TORCH_ALLOW_TF32_CUBLAS_OVERRIDE`" in done.stderr
    assert "set_float32_matmul_precision" not in done.stderr


NEEDED = "float32 matrix products must run in full precision to merge by covariance; got "


def told(device: torch.device) -> str:
    with pytest.raises(RuntimeError) as raised:
        require_full_float32(device)
    return str(raised.value)


def test_what_is_said_of_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    call = "Call torch.set_float32_matmul_precision('highest') before the merge."
    monkeypatch.delenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", raising=False)
    for word in ("high", "medium"):
        torch.set_float32_matmul_precision(word)
        assert told(CPU) == f"{NEEDED}float32 matmul precision {word!r}. {call}"
    monkeypatch.setenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "")
    assert told(CPU).endswith(call)
    monkeypatch.setenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1")
    assert told(CPU) == (
        f"{NEEDED}float32 matmul precision 'medium'. The environment has TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1: run "
        "`unset TORCH_ALLOW_TF32_CUBLAS_OVERRIDE` and start the merge again."
    )


@pytest.mark.skipif(not EACH_BACKEND, reason="this torch has one switch for all backends")
def test_what_is_said_of_one_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", raising=False)
    lower_mkldnn()
    assert told(CPU) == (
        f"{NEEDED}torch.backends.mkldnn.matmul.fp32_precision = 'bf16'. "
        "Call torch.set_float32_matmul_precision('highest') before the merge."
    )


def test_what_is_said_of_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_multiplies_in_full", lambda device: False)
    variables = ("NVIDIA_TF32_OVERRIDE", "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE")
    for name in variables:
        monkeypatch.delenv(name, raising=False)
    product = f"{NEEDED}a product on cpu with 11 bits or fewer. "
    assert told(CPU) == (
        f"{product}Unset what forces it (NVIDIA_TF32_OVERRIDE, ONEDNN_DEFAULT_FPMATH_MODE, DNNL_DEFAULT_FPMATH_MODE "
        "are known to), or merge on another device."
    )
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    monkeypatch.setenv("DNNL_DEFAULT_FPMATH_MODE", "a=b")
    assert told(CPU) == (
        f"{product}The environment has ONEDNN_DEFAULT_FPMATH_MODE=BF16, DNNL_DEFAULT_FPMATH_MODE=a=b: run "
        "`unset ONEDNN_DEFAULT_FPMATH_MODE DNNL_DEFAULT_FPMATH_MODE` and start the merge again."
    )


@pytest.mark.parametrize(("entry", "full"), [(1 + 2**-12, True), (1.0, False), (1 + 2**-13, False)])
def test_a_product_is_full_where_the_bit_of_the_square_is_there(
    entry: float, full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a device makes of the factors: the square of 1 + 2^-12 is 1 + 2^-11 and a little."""
    original = torch.full
    monkeypatch.setattr(torch, "full", lambda size, value, **given: original(size, entry, **given))
    assert precision._multiplies_in_full(CPU) is full


def test_a_variable_that_is_off_is_not_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "0")
    torch.set_float32_matmul_precision("high")
    with pytest.raises(RuntimeError, match=r"'high'\. Call torch\.set_float32_matmul_precision"):
        require_full_float32(CPU)


@pytest.mark.skipif(not AVAILABLE, reason="this torch cannot be given a device in Python")
@pytest.mark.parametrize("known", [True, False])
def test_products_that_something_else_lowers_are_found_once_a_device(
    known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver reads NVIDIA_TF32_OVERRIDE, and torch knows nothing of it."""
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    if known:
        monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    remedy = "run `unset NVIDIA_TF32_OVERRIDE`" if known else "NVIDIA_TF32_OVERRIDE"
    with PretendedAccelerator(tf32=True), pytest.raises(RuntimeError, match=f"full precision.*gpu:0.*{remedy}"):
        require_full_float32(torch.device("gpu:0"))
    precision._multiplies_in_full.cache_clear()
    with PretendedAccelerator() as accelerator:
        require_full_float32(torch.device("gpu:0"))
        assert sum(accelerator.waits.values()) == 1
        require_full_float32(torch.device("gpu:0"))
        assert sum(accelerator.waits.values()) == 1


def test_products_of_the_cpu_are_tried_too() -> None:
    assert precision._multiplies_in_full(CPU)
