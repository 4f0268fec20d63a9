"""What one tensor's merge takes, from headers alone: bytes, and counts of arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, field

from mergekit.common import dtype_from_name

from mergekit_ace.checkpoints.headers import TensorHeader
from mergekit_ace.linalg.precision import working_dtype
from mergekit_ace.matrix.workload import averaging_bytes, by_matrix_weights, unrefined_numbers, working_numbers
from mergekit_ace.methods.layerwise import LayerwiseMethod
from mergekit_ace.methods.tensors.measured_moments import measured_inputs
from mergekit_ace.moments.index import MomentsError
from mergekit_ace.recipe.arithmetic import Arithmetic, arithmetic_of
from mergekit_ace.recipe.plan import Plan, PlannedTensor
from mergekit_ace.recipe.treatments import treated
from mergekit_ace.tensor_treatment import Treatment

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
        assert isinstance(plan.method, LayerwiseMethod)
        m, n, experts = solved.m, solved.n, len(models) - 1
        parameters = plan.method.in_force(solved.treatment, tensor.shared_parameters, tensor.vocabulary_axis)
        measured = 0 if solved.treatment.kind == "head" else _measured_inputs(tensor)
        arithmetic = arithmetic_of(plan.method, parameters, m, n, experts, measured=measured) * solved.count
        numbers = working_numbers(m, n, experts, measured=measured > 0)
        if solved.treatment.kind == "head" and by_matrix_weights(m, n, experts):
            numbers = min(numbers, unrefined_numbers(m, n, experts))
        workspace = numbers * working_dtype(dtype).itemsize
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


@dataclass(frozen=True, kw_only=True)
class SolvedMatrices:
    """What is solved of one tensor: `count` matrices of `[m, n]`, inputs last."""

    treatment: Treatment
    count: int
    m: int
    n: int


def solved_matrices(plan: Plan, tensor: PlannedTensor, shape: tuple[int, ...]) -> SolvedMatrices | None:
    """The matrices that a tensor's merge solves; None where none is."""
    if not isinstance(plan.method, LayerwiseMethod):
        return None
    treatment = treated(plan.method, tensor, shape)
    if treatment.kind not in ("matrix", "stack", "head"):
        return None
    parameters = plan.method.in_force(treatment, tensor.shared_parameters, tensor.vocabulary_axis)
    m, n = shape[-2:] if parameters["input_axis"] == "last" else (shape[-1], shape[-2])
    return SolvedMatrices(treatment=treatment, count=shape[0] if treatment.kind == "stack" else 1, m=m, n=n)
