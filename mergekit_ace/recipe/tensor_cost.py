"""What one tensor's merge takes, from headers alone: bytes, and counts of arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, field

from mergekit.common import dtype_from_name

from mergekit_ace.checkpoints.headers import TensorHeader
from mergekit_ace.linalg.precision import working_dtype
from mergekit_ace.matrix.workload import averaging_bytes, working_numbers
from mergekit_ace.methods.layerwise import LayerwiseMethod
from mergekit_ace.methods.measured_moments import measured_inputs
from mergekit_ace.moments.index import MomentsError
from mergekit_ace.recipe.arithmetic import Arithmetic, arithmetic_of
from mergekit_ace.recipe.plan import Plan, PlannedTensor

PYTHON = 700_000_000
"""Resident size of a process that has imported torch, transformers and mergekit, in bytes."""


@dataclass(frozen=True, kw_only=True)
class TensorCost:
    """Of one tensor, in bytes and counts."""

    read: int = 0
    """Bytes on disk."""
    written: int = 0
    """Bytes of the output."""
    inputs: int = 0
    """Bytes of the inputs in memory."""
    workspace: int = 0
    """The most bytes that its merge holds beside its inputs."""
    arithmetic: Arithmetic = field(default_factory=Arithmetic)


def tensor_cost(plan: Plan, tensor: PlannedTensor, output: TensorHeader | None) -> TensorCost:
    """Estimate one tensor from the headers of its inputs and output.

    Args:
        plan: of the merge.
        tensor: of it.
        output: its shape and dtype when saved; None where nothing is saved, which costs nothing.
    """
    if output is None:
        return TensorCost()
    models = [model for model in (tensor.base, *tensor.experts) if model is not None and tensor.reads(model)]
    headers = [header for model in models if (header := tensor.header(model)) is not None]
    dtype = dtype_from_name(plan.recipe.config.dtype) or (headers[0].dtype if headers else output.dtype)
    workspace = averaging_bytes(output.elements, dtype) if dtype.is_floating_point else 0  # else it is copied
    arithmetic = Arithmetic(single=float(output.elements * len(models)))
    solved = solved_matrices(plan, tensor, output.shape)
    if solved is not None and len(models) > 1:
        count, m, n = solved
        assert isinstance(plan.method, LayerwiseMethod)
        parameters, experts = tensor.shared_parameters, len(models) - 1
        measured = _measured_inputs(tensor)
        arithmetic = arithmetic_of(plan.method, parameters, m, n, experts, measured=measured) * count
        workspace = working_numbers(m, n, experts, measured=measured > 0) * working_dtype(dtype).itemsize
    return TensorCost(
        # A tensor that mergekit converts has no header of its own.
        read=sum(header.bytes for header in headers) or output.bytes * len(models),
        written=output.bytes,
        inputs=output.elements * dtype.itemsize * len(models),
        workspace=workspace,
        arithmetic=arithmetic,
    )


def _measured_inputs(tensor: PlannedTensor) -> int:
    try:
        return measured_inputs(tensor.name, tensor.shared_parameters)
    except MomentsError:  # said by the check of the moments
        return 0


def solved_matrices(plan: Plan, tensor: PlannedTensor, shape: tuple[int, ...]) -> tuple[int, int, int] | None:
    """How many matrices are solved, and their `m` and `n`; None where none is."""
    if not isinstance(plan.method, LayerwiseMethod):
        return None
    parameters = tensor.shared_parameters
    kind = plan.method.treat(tensor.name, shape, tensor.vocabulary_axis, parameters).kind
    if kind not in ("matrix", "stack"):
        return None
    m, n = shape[-2:] if parameters["input_axis"] == "last" else (shape[-1], shape[-2])
    return (shape[0] if kind == "stack" else 1), m, n
