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


@pytest.mark.skipif(not EACH_BACKEND, reason="this torch has one setting for all backends")
@pytest.mark.parametrize("backend", ["cudnn", "cudnn.conv", "cuda.matmul"])
def test_what_other_devices_read_is_no_reason_to_refuse(backend: str) -> None:
    code = (
        "import torch; from mergekit_ace.linalg.precision import require_full_float32, _lowered_setting\n"
        f"torch.backends.{backend}.fp32_precision = 'tf32'\n"
        "require_full_float32(torch.device('cpu'))\n"
        "print(_lowered_setting(torch.device('cuda:0')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # cuDNN's setting for all its operations is cuBLAS's too, that for convolutions is not.
    assert ("cuda.matmul.fp32_precision = 'tf32'" in done.stdout) == (backend != "cudnn.conv")


@pytest.mark.parametrize("value", ["1", "0"])
def test_torchs_variable_is_named_with_what_undoes_it(value: str) -> None:
    code = (
        "import torch; from mergekit_ace.linalg.precision import require_full_float32\n"
        "require_full_float32(torch.device('cpu'))"
    )
    environment = os.environ | {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": value}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert ("run `unset TORCH_ALLOW_TF32_CUBLAS_OVERRIDE`" in done.stderr) == (value == "1")
    assert "set_float32_matmul_precision" not in done.stderr
    assert done.returncode == int(value)


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
