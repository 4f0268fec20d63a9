"""A device that fails: once, twice, for good; in memory, in a library, in an eigendecomposition."""

import logging

import pytest
import torch
from mergekit.merge_methods.api import merge_tensors
from torch import Tensor

from mergekit_ace.methods.ace import Ace
from tests.device.pretended import AVAILABLE, PretendedAccelerator
from tests.family.cases import drawn

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="this torch cannot be given a device in Python")

aten = torch.ops.aten
NO_MEMORY = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`\nCUDA kernel errors might be"
FAILURES = {
    "cuBLAS": (aten.addmm_.default, lambda: RuntimeError(NO_MEMORY)),
    "cuSOLVER": (aten._linalg_eigh.default, lambda: RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when")),
    "eigenvalues": (aten._linalg_eigh.default, lambda: torch.linalg.LinAlgError("linalg.eigh: failed to converge")),
    "memory": (aten.linalg_cholesky_ex.default, lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to")),
}
if hasattr(torch, "AcceleratorError"):
    FAILURES["accelerator"] = (
        aten.linalg_cholesky_ex.default,
        lambda: torch.AcceleratorError("CUDA error: unspecified launch failure\nCUDA kernel errors might be"),
    )
EVERY = pytest.mark.parametrize("failure", FAILURES)
NAME = "layers.0.weight"


def merged(method: Ace, tensors: list[Tensor], name: str = NAME) -> Tensor:
    return merge_tensors(tensors, method, base_index=0, name=name)


@pytest.fixture
def tensors() -> list[Tensor]:
    base, experts = drawn(3, 30, 20, dtype=torch.float32)
    return [base, *experts]


@EVERY
def test_one_failure_is_tried_again_on_the_device(
    failure: str, tensors: list[Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    operation, error = FAILURES[failure]
    method = Ace()
    expected = merged(method, tensors)
    caplog.clear()
    with PretendedAccelerator() as accelerator:
        on_device = [accelerator.place(tensor, "gpu:0") for tensor in tensors]
        accelerator.failures[operation] = [error()]
        result = merged(method, on_device)
    assert accelerator.emptied == 1
    assert result.device.type == "gpu"
    assert torch.equal(result.cpu(), expected)
    assert not caplog.records


@EVERY
def test_two_failures_take_the_cpu_and_say_so_once(
    failure: str, tensors: list[Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    operation, error = FAILURES[failure]
    method = Ace()
    expected = merged(method, tensors)
    caplog.clear()
    with PretendedAccelerator() as accelerator:
        on_device = [accelerator.place(tensor, "gpu:1") for tensor in tensors]
        # Two tensors of one merge: a name that comes again would be the start of another.
        for name in (NAME, "layers.1.weight"):
            accelerator.failures[operation] = [error(), error()]
            result = merged(method, on_device, name)
            assert result.device == torch.device("gpu:1")
            assert torch.equal(result.cpu(), expected)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    reason = str(error()).splitlines()[0]
    assert record.getMessage().startswith(
        f"{NAME}: gpu:1 failed twice ({reason}), so this tensor was merged on the CPU"
    )


@pytest.mark.parametrize(
    ("failure", "remedy"),
    [
        ("cuBLAS", "Run without --cuda"),
        ("eigenvalues", "matrices: average"),
        ("accelerator", "Start the merge again"),
        ("memory", "embeddings: base"),
    ],
)
def test_what_fails_everywhere_names_the_tensor_and_a_remedy(
    failure: str, remedy: str, tensors: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    if failure not in FAILURES:
        pytest.skip("this torch has no such error")
    error = FAILURES[failure][1]

    def fail(*_: object, **__: object) -> None:
        raise error()

    monkeypatch.setattr("mergekit_ace.methods.ace.merge_by_covariance", fail)
    with PretendedAccelerator() as accelerator:
        on_device = [accelerator.place(tensor, "gpu:0") for tensor in tensors]
        with pytest.raises(RuntimeError, match=rf"^{NAME}: a \(30, 20\) torch.float32.* on gpu:0.*{remedy}") as raised:
            merged(Ace(), on_device)
    assert isinstance(raised.value, torch.OutOfMemoryError) == (failure in ("cuBLAS", "memory"))
    assert "\n" not in str(raised.value)
    with pytest.raises(RuntimeError, match=rf"^{NAME}: .* on cpu"):
        merged(Ace(), tensors)


def test_a_device_that_is_too_small_leaves_its_largest_tensors_to_the_cpu(
    tensors: list[Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    method = Ace()
    table = "model.embed_tokens.weight"
    expected = [merged(method, tensors, name) for name in (NAME, table)]
    caplog.clear()
    # A float32 matrix of 30 x 20 is 2400 bytes; its average takes the result and a float64 copy of a block.
    with PretendedAccelerator(capacity=12_000) as accelerator:
        on_device = [accelerator.place(tensor, "gpu:0") for tensor in tensors]
        results = [merged(method, on_device, name).cpu() for name in (NAME, table)]
    assert accelerator.peak <= 12_000
    assert all(torch.equal(result, wanted) for result, wanted in zip(results, expected, strict=True))
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{NAME}: gpu:0 failed twice (CUDA out of memory")


def test_every_slice_of_a_stack_is_tried_by_itself(caplog: pytest.LogCaptureFixture) -> None:
    base, experts = drawn(2, 3, 20, 10, dtype=torch.float32)
    method, name = Ace(), "mlp.experts.down_proj"
    expected = merged(method, [base, *experts], name)
    with PretendedAccelerator() as accelerator:
        on_device = [accelerator.place(tensor, "gpu:0") for tensor in (base, *experts)]
        accelerator.failures[aten._linalg_eigh.default] = [
            torch.linalg.LinAlgError("no"),
            torch.linalg.LinAlgError("no"),
        ]
        result = merged(method, on_device, name)
    assert torch.equal(result.cpu(), expected)
    assert sum(f"{name}[0]: gpu:0 failed twice" in record.getMessage() for record in caplog.records) == 1


def test_an_error_of_the_numbers_is_no_failure_of_the_device(tensors: list[Tensor]) -> None:
    tensors[1][0, 0] = torch.nan
    with PretendedAccelerator() as accelerator:
        on_device = [accelerator.place(tensor, "gpu:0") for tensor in tensors]
        with pytest.raises(ValueError, match=NAME):
            merged(Ace(), on_device)
    assert accelerator.emptied == 0
