"""A device that fails: once, twice, for good; in memory, in a library, in an eigendecomposition."""

import logging

import pytest
import torch
from mergekit.merge_methods.api import merge_tensors
from torch import Tensor

from mergekit_ace.matrix.expert import Expert
from mergekit_ace.methods.ace import Ace
from mergekit_ace.methods.tensors.device_failures import is_device_failure, named, on_device_or_cpu
from mergekit_ace.methods.tensors.matrices import Matrix
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


CUBLAS = "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED"
MESSAGES = [
    (
        RuntimeError(f"{NO_MEMORY} more"),
        "not enough memory (CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`). Run without "
        "--cuda and --read-to-gpu, or free memory; for an embedding table or output head, embeddings: base needs the "
        "least, and embeddings: average little more.",
        "not enough memory (CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`). Free memory; "
        "for an embedding table or output head, embeddings: base needs the least, and embeddings: average little more.",
    ),
    (
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory.\nmore"),
        "not enough memory ([enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory). Run without "
        "--cuda and --read-to-gpu, or free memory; for an embedding table or output head, embeddings: base needs the "
        "least, and embeddings: average little more.",
        "not enough memory ([enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory). Free memory; "
        "for an embedding table or output head, embeddings: base needs the least, and embeddings: average little more.",
    ),
    *(
        (
            RuntimeError(f"{words}. \nmore"),
            f"{words}. Start the merge again, or run it without --cuda and --read-to-gpu.",
            f"{words}. Start the merge again, or run it without --cuda and --read-to-gpu.",
        )
        for words in (CUBLAS, "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR", "HIP error: x", "XPU error: x")
    ),
    (
        torch.linalg.LinAlgError("linalg.eigh: failed to converge"),
        "linalg.eigh: failed to converge. Set matrices: average for this tensor by a filter.",
        "linalg.eigh: failed to converge. Set matrices: average for this tensor by a filter.",
    ),
]


@pytest.mark.parametrize(("error", "on_device", "on_cpu"), MESSAGES)
def test_what_is_said_of_a_failure(error: RuntimeError, on_device: str, on_cpu: str) -> None:
    """By `named` itself: a tensor of the device `meta` has a shape and a dtype, and no need of an accelerator."""
    assert is_device_failure(error)
    for device, told in (
        (
            "meta",
            f"w: a (2, 3) torch.float16 tensor could not be merged on meta, tried twice, nor on the CPU: {on_device}",
        ),
        ("cpu", f"w: a (2, 3) torch.float16 tensor could not be merged on cpu: {on_cpu}"),
    ):
        with pytest.raises(RuntimeError) as raised, named("w", torch.empty(2, 3, dtype=torch.float16, device=device)):
            raise error
        assert str(raised.value) == told
        assert isinstance(raised.value, torch.OutOfMemoryError) == ("not enough memory" in told)
        assert raised.value.__cause__ is error


def test_other_errors_pass_as_they_are() -> None:
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert not is_device_failure(error)
    with pytest.raises(RuntimeError) as raised, named("w", torch.empty(1)):
        raise error
    assert raised.value is error


def test_on_a_cpu_nothing_is_tried_twice() -> None:
    attempts, warned = [], []

    def step(matrix: Matrix) -> tuple[Tensor, str]:
        attempts.append(matrix)
        raise torch.OutOfMemoryError("no")

    matrix = Matrix(
        name="w",
        place=(),
        base=torch.zeros(2, 3),
        experts=(Expert(name="one", tensor=torch.ones(2, 3)),),
    )
    with pytest.raises(torch.OutOfMemoryError, match=r"^no$"):
        on_device_or_cpu(step, matrix, lambda *told: warned.append(told))
    assert len(attempts) == 1
    assert warned == []
    found = on_device_or_cpu(lambda given: (given.base + given.experts[0].tensor, "note"), matrix, lambda *_: None)
    assert torch.equal(found[0], torch.ones(2, 3))
    assert found[1] == "note"


def test_an_error_of_another_kind_is_not_tried_again(tensors: list[Tensor]) -> None:
    attempts = []

    def step(matrix: Matrix) -> tuple[Tensor, str]:
        attempts.append(matrix.base.device)
        raise RuntimeError("shapes cannot be multiplied")

    with PretendedAccelerator() as accelerator:
        base, one, *_ = (accelerator.place(tensor, "gpu:0") for tensor in tensors)
        matrix = Matrix(name="w", place=(), base=base, experts=(Expert(name="one", tensor=one),))
        with pytest.raises(RuntimeError, match="shapes"):
            on_device_or_cpu(step, matrix, lambda *_: None)
    assert attempts == [torch.device("gpu:0")]
    assert accelerator.emptied == 0


def test_the_first_reason_of_the_second_attempt_is_told(tensors: list[Tensor]) -> None:
    """All of the matrix is on the device, then on the CPU, and the weight comes back."""
    seen, warned = [], []

    def step(matrix: Matrix) -> tuple[Tensor, str]:
        seen.append([tensor.device.type for tensor in (matrix.base, *(expert.tensor for expert in matrix.experts))])
        if len(seen) < 3:
            raise torch.OutOfMemoryError(f"attempt {len(seen)}. \nmore")
        return matrix.base, "note"

    with PretendedAccelerator() as accelerator:
        base, one, *_ = (accelerator.place(tensor, "gpu:0") for tensor in tensors)
        matrix = Matrix(name="w", place=(), base=base, experts=(Expert(name="one", tensor=one),))
        weight, note = on_device_or_cpu(step, matrix, lambda *told: warned.append(told))
        assert weight.device == torch.device("gpu:0")
    assert note == "note"
    assert seen == [["gpu", "gpu"], ["gpu", "gpu"], ["cpu", "cpu"]]
    assert warned == [("device", "w: gpu:0 failed twice (attempt 2), so this tensor was merged on the CPU")]
    assert accelerator.emptied == 1


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
