"""When a device fails at a tensor: it is tried once more, then the CPU is, and what cannot be mended has a name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from mergekit_ace.methods.tensors.matrices import Matrix

Step = Callable[[Matrix], tuple[Tensor, str]]

_NoConvergence: type[Exception] = torch.linalg.LinAlgError  # type: ignore[attr-defined]
_KINDS: tuple[type[Exception], ...] = (torch.OutOfMemoryError, _NoConvergence)
if hasattr(torch, "AcceleratorError"):  # torch 2.8 and later
    _KINDS = (*_KINDS, torch.AcceleratorError)
# Libraries under torch fail with a plain RuntimeError, which is known by its words alone.
_WORDS = ("CUBLAS_STATUS_", "CUSOLVER_STATUS_", "CUDA error", "HIP error", "XPU error", "DefaultCPUAllocator")
_WORDS_OF_MEMORY = ("out of memory", "ALLOC_FAILED", "DefaultCPUAllocator")


def on_device_or_cpu(step: Step, matrix: Matrix, warn: Callable[[str, str], None]) -> tuple[Tensor, str]:
    """A step of the merge on the device of its tensors; where that fails twice, on the CPU.

    Before the second attempt the device gets back the memory that torch keeps for later. The weights differ by the
    rounding of the device's kernels at most.

    Args:
        step: from a matrix, or tensors of any shape, to a weight and a note on it.
        matrix: all of it on one device.
        warn: takes a cause and a message; called where the CPU had to be taken.

    Returns:
        As of `step`, the weight on the base's device.

    Raises:
        RuntimeError: of `step`, as it is: one that is no device's failure at once, else that of the last attempt.
    """
    here, cpu = matrix.base.device, torch.device("cpu")
    attempts = [here] if here.type == "cpu" else [here, here, cpu]
    reason = ""
    for number, device in enumerate(attempts):
        try:
            if number == 1:
                _empty_cache(device)
            experts = tuple(replace(expert, tensor=expert.tensor.to(device)) for expert in matrix.experts)
            weight, notes = step(replace(matrix, base=matrix.base.to(device), experts=experts))
            if device != here:
                warn("device", f"{matrix.name}: {here} failed twice ({reason}), so this tensor was merged on the CPU")
            return weight.to(here), notes
        except RuntimeError as error:
            if number + 1 == len(attempts) or not is_device_failure(error):
                raise
            # The next attempt starts outside of this block: the error's traceback keeps the buffers of this one alive.
            reason = _first_line(error)
    raise AssertionError("every attempt returns or raises")


@contextmanager
def named(name: str, base: Tensor) -> Iterator[None]:
    """Give a device's failure the tensor's name and a remedy.

    Raises:
        torch.OutOfMemoryError: memory was what failed.
        RuntimeError: anything else that `is_device_failure` knows.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_device_failure(error):
            raise
        on_cpu = base.device.type == "cpu"
        what = f"{name}: a {tuple(base.shape)} {base.dtype} tensor could not be merged on {base.device}"
        tried = "" if on_cpu else ", tried twice, nor on the CPU"
        if any(word in str(error) for word in _WORDS_OF_MEMORY):
            where = "Free memory" if on_cpu else "Run without --cuda and --read-to-gpu, or free memory"
            raise torch.OutOfMemoryError(
                f"{what}{tried}: not enough memory ({_first_line(error)}). {where}; for an embedding table or output "
                "head, embeddings: base needs the least, and embeddings: average little more."
            ) from error
        remedy = (
            "Set matrices: average for this tensor by a filter"
            if isinstance(error, _NoConvergence)
            else "Start the merge again, or run it without --cuda and --read-to-gpu"
        )
        raise RuntimeError(f"{what}{tried}: {_first_line(error)}. {remedy}.") from error


def is_device_failure(error: RuntimeError) -> bool:
    """Whether an error is of a device, its memory or a library on it, and not of the numbers or of a recipe."""
    return isinstance(error, _KINDS) or any(word in str(error) for word in _WORDS)


def _first_line(error: RuntimeError) -> str:
    """Torch's errors go on with advice for developers."""
    return str(error).partition("\n")[0].strip().rstrip(".")


def _empty_cache(device: torch.device) -> None:
    backend = getattr(torch, device.type)
    if hasattr(backend, "empty_cache"):
        backend.empty_cache()
