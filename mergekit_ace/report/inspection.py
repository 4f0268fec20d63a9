"""A whole recipe, tensor by tensor: what the merge will do to each."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from mergekit.merge_methods.base import TensorGroup
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_ace import __version__
from mergekit_ace.matrix.diagnostics import diagnostics
from mergekit_ace.matrix.expert import Expert, require_finite_base
from mergekit_ace.matrix.merge import MatrixMerge
from mergekit_ace.matrix.options import CovarianceOptions
from mergekit_ace.matrix.task_vectors import TaskVectors
from mergekit_ace.methods.ace import Ace
from mergekit_ace.methods.layerwise import LayerwiseMethod
from mergekit_ace.methods.matrices import matrices, weighted_experts
from mergekit_ace.methods.measured_moments import with_measured_moments
from mergekit_ace.policy import Treatment
from mergekit_ace.recipe.failures import READING, message_of
from mergekit_ace.recipe.plan import Inputs, Plan, PlannedTensor, planned
from mergekit_ace.recipe.reading import read_recipe
from mergekit_ace.report.interference import interference
from mergekit_ace.report.measure import Measured, expert_reports, left_out, measure_merge, measure_norms
from mergekit_ace.report.model import Branch, LayerReport, Mode, Report
from mergekit_ace.report.naming import place


def inspect_recipe(recipe: Path, options: MergeOptions | None = None, *, mode: Mode = "full") -> Report:
    """Inspect a recipe file from its first tensor to its last.

    Args:
        recipe: as for `mergekit-yaml`.
        options: of `mergekit-yaml`; its defaults when None.
        mode: `fast` for norms, traces and heterogeneity; `full` for solves and spectra too.

    Raises:
        RecipeError: when mergekit cannot read or plan it. A tensor that cannot be read or merged does not raise: its
            layer says so.
    """
    with planned(read_recipe(recipe), options or MergeOptions()) as plan:
        return assemble(plan, inspect_tensors(plan, mode), mode)


def inspect_tensors(plan: Plan, mode: Mode) -> Iterator[LayerReport]:
    """Each layer as soon as it is measured, in the order of the model; one tensor of every model is held at a time."""
    for tensor in plan.tensors:
        yield from inspect_tensor(plan, tensor, mode)


def assemble(plan: Plan, layers: Iterable[LayerReport], mode: Mode, *, complete: bool = True) -> Report:
    """The report of the layers measured so far."""
    return Report(
        producer=f"mergekit-ace {__version__}",
        recipe=plan.recipe.name,
        method=plan.method.spec.name,
        mode=mode,
        complete=complete,
        base=str(plan.base) if plan.base else None,
        experts=tuple(str(model) for model in plan.experts),
        note=_note(plan),
        layers=tuple(layers),
    )


def work(tensor: PlannedTensor, mode: Mode) -> int:
    """What a tensor will cost relative to the others, from its header: for a progress bar."""
    model = tensor.base or tensor.experts[0]
    try:
        header = tensor.header(model)
    except READING:
        return 1
    if header is None or header.elements == 0:
        return 1
    solved = mode == "full" and len(header.shape) > 1 and tensor.vocabulary_axis is None
    return header.elements * (1 + min(header.shape[-2:]) // 8 if solved else 1)


def inspect_tensor(plan: Plan, tensor: PlannedTensor, mode: Mode) -> Iterator[LayerReport]:
    """One planned tensor: no layer if no model has it, one for each slice of a stack, else one."""
    started = time.perf_counter()
    where = place(tensor.name)
    layer = LayerReport(name=tensor.name, depth=where.depth, kind=where.kind, shape=(), branch="failed", reason="")
    try:
        inputs = tensor.load()
        if inputs is None:
            return
        layer = replace(layer, shape=tuple(inputs.group.entries[0].tensor.shape))
        if inputs.is_buffer:
            yield replace(layer, branch="copied", reason="not floating point", seconds=time.perf_counter() - started)
            return
        for measured in _layers(plan, layer, inputs, mode):
            yield replace(measured, seconds=time.perf_counter() - started)
            started = time.perf_counter()
    except READING as error:
        yield replace(
            layer, reason="the merge would stop here", error=message_of(error), seconds=time.perf_counter() - started
        )


def _layers(plan: Plan, layer: LayerReport, inputs: Inputs, mode: Mode) -> Iterator[LayerReport]:
    method, group = plan.method, inputs.group
    if not isinstance(method, LayerwiseMethod):
        yield _foreign(layer, method.spec.name, group)
        return
    assert group.base is not None  # every method of ours requires one, and mergekit has seen to it
    base = group.base.tensor
    experts = weighted_experts(group, inputs.parameters)
    treated = method.treat(layer.name, base.shape, group.metadata.vocabulary_axis, inputs.parameters)
    layer = replace(layer, reason=treated.reason)
    if treated.kind == "buffer":
        yield replace(layer, branch="copied")
        return
    if treated.kind in ("average", "base"):
        yield _unsolved(layer, treated, base, experts)
        return
    if treated.kind == "matrix":
        experts = with_measured_moments(layer.name, base, experts, inputs.parameters, _not_said)
    for matrix in matrices(layer.name, base, experts, inputs.parameters):
        part = replace(layer, name=matrix.name, shape=tuple(base.shape[-2:]))
        task_vectors = TaskVectors(matrix.base, matrix.experts, name=matrix.name)
        yield _matrix(part, method, task_vectors, matrix.experts, inputs.parameters, mode)


def _not_said(cause: str, message: str) -> None:
    """The merge warns of experts without measured moments; the report counts those with."""


def _matrix(
    layer: LayerReport,
    method: LayerwiseMethod,
    task_vectors: TaskVectors,
    experts: Sequence[Expert],
    parameters: Any,
    mode: Mode,
) -> LayerReport:
    measured = measure_norms(task_vectors, _gated(method, parameters))
    layer = replace(layer, left_out=left_out(task_vectors))
    if mode == "full" and len(task_vectors):
        with diagnostics():
            merge = (
                method.merge_matrix(task_vectors, parameters)
                if len(task_vectors) > 1
                else MatrixMerge(task_vector=task_vectors.task_vector(0))
            )
        measured = measure_merge(measured, task_vectors, merge, method.scale(parameters))
        if len(task_vectors) > 1:
            layer = replace(layer, interference=interference(task_vectors))
    return replace(layer, **_fields(measured))


def _unsolved(layer: LayerReport, treated: Treatment, base: Tensor, experts: Sequence[Expert]) -> LayerReport:
    averaged = treated.kind == "average"
    columns = [_column(expert) for expert in experts]
    if not averaged:
        require_finite_base(base, name=layer.name)
    try:
        task_vectors = TaskVectors(base.reshape(-1, 1), columns, name=layer.name)
    except ValueError:
        if averaged:
            raise
        return replace(layer, branch="base")  # the merge looks at no expert here
    changed: Branch = "average" if len(task_vectors) else "frozen"
    return replace(
        layer,
        branch=changed if averaged else "base",
        experts=expert_reports(task_vectors, task_vectors.energies),
        left_out=left_out(task_vectors),
    )


def _foreign(layer: LayerReport, method: str, group: TensorGroup) -> LayerReport:
    layer = replace(layer, branch="method", reason=f"merged by {method}")
    if group.base is None:
        return layer
    experts = [_column(Expert(name=str(entry.id), tensor=entry.tensor)) for entry in group.non_base]
    task_vectors = TaskVectors(group.base.tensor.reshape(-1, 1), experts, name=layer.name)
    return replace(
        layer,
        experts=expert_reports(task_vectors, task_vectors.energies),
        left_out=left_out(task_vectors),
    )


def _column(expert: Expert) -> Expert:
    """As one column: norms need no shape, and the mean row that `TaskVectors` takes is then a single number."""
    return replace(expert, tensor=expert.tensor.reshape(-1, 1))


def _gated(method: LayerwiseMethod, parameters: Any) -> CovarianceOptions | None:
    return method.options(parameters) if isinstance(method, Ace) else None


def _note(plan: Plan) -> str | None:
    name = plan.method.spec.name
    if not isinstance(plan.method, LayerwiseMethod):
        return f"{name} is not a method of mergekit-ace: its update norms are shown, but not what it makes of them."
    if not isinstance(plan.method, Ace):
        return f"{name} has no heterogeneity gate: heterogeneity is shown, but decides nothing."
    return None


def _fields(measured: Measured) -> dict[str, Any]:
    return {field.name: getattr(measured, field.name) for field in fields(measured)}
