"""What a tensor's merge takes: seconds relative to others, for the order of work and the time left; and bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from mergekit.common import dtype_from_name

from mergekit_ace.linalg.precision import working_dtype
from mergekit_ace.matrix.workload import averaging_bytes, multiply_adds, working_numbers
from mergekit_ace.recipe.cost import solved_matrices
from mergekit_ace.recipe.plan import Plan, PlannedTensor

# A machine of no particular kind: only the ratios matter.
_MULTIPLY_ADDS_A_SECOND = 5e10
_BYTES_A_SECOND = 1e9
# A float64 eigendecomposition in float32 multiply-adds, over its size cubed.
_EIGENDECOMPOSITION = 12


@dataclass(frozen=True, kw_only=True)
class TensorCost:
    """Of one tensor."""

    seconds: float
    """Reading and arithmetic, on a machine of no particular kind."""
    read: int
    """Bytes on disk."""
    inputs: int
    """Bytes of the inputs in memory."""
    workspace: int
    """The most bytes that its merge holds beside its inputs."""


def tensor_cost(plan: Plan, tensor: PlannedTensor) -> TensorCost:
    """Estimate one tensor from headers; all 0 for one that is not saved."""
    output = tensor.output
    if output is None:
        return TensorCost(seconds=0.0, read=0, inputs=0, workspace=0)
    models = [model for model in (tensor.base, *tensor.experts) if model is not None and tensor.reads(model)]
    headers = [header for model in models if (header := tensor.header(model)) is not None]
    # A tensor that mergekit converts has no header of its own.
    read = sum(header.bytes for header in headers) or output.bytes * len(models)
    dtype = dtype_from_name(plan.recipe.config.dtype) or (headers[0].dtype if headers else output.dtype)
    arithmetic, workspace = _averaged(output.elements, dtype, len(models))
    solved = solved_matrices(plan, tensor, output.shape)
    if solved is not None and len(models) > 1:
        count, m, n = solved
        arithmetic = count * (multiply_adds(m, n, len(models) - 1) + _EIGENDECOMPOSITION * min(m, n) ** 3)
        workspace = working_numbers(m, n, len(models) - 1) * working_dtype(dtype).itemsize
    return TensorCost(
        seconds=(read + output.bytes) / _BYTES_A_SECOND + arithmetic / _MULTIPLY_ADDS_A_SECOND,
        read=read,
        inputs=output.elements * dtype.itemsize * len(models),
        workspace=workspace,
    )


def _averaged(elements: int, dtype: torch.dtype, models: int) -> tuple[float, int]:
    # Not floating point: copied.
    workspace = averaging_bytes(elements, dtype) if dtype.is_floating_point else 0
    return float(elements * models), workspace
