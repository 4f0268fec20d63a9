"""A whole recipe, tensor by tensor: what the merge will do to each."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergekit.merge_methods.base import MergeMethod, TensorGroup
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_ace import __version__
from mergekit_ace.matrix.diagnostics import diagnostics
from mergekit_ace.matrix.expert import Expert, require_finite_base
from mergekit_ace.matrix.stored_task_vectors import StoredTaskVectors
from mergekit_ace.matrix.task_vectors import TaskVectors
from mergekit_ace.methods.layerwise import LayerwiseMethod
from mergekit_ace.recipe.failures import READING, message_of
from mergekit_ace.recipe.plan import Inputs, Plan, PlannedTensor
from mergekit_ace.recipe.planning import planned
from mergekit_ace.recipe.reading import read_recipe
from mergekit_ace.report.measure import merge_fields, norms
from mergekit_ace.report.model import Mode, Report, TensorReport
from mergekit_ace.report.naming import place
from mergekit_ace.report.sampling import sample

_MOST_SPECTRA = 8


def inspect_recipe(recipe: Path, options: MergeOptions | None = None, *, mode: Mode = "full") -> Report:
    """Inspect a recipe file from its first tensor to its last.

    Args:
        recipe: as for `mergekit-yaml`.
        options: of `mergekit-yaml`; its defaults when None.
        mode: `fast` for norms and heterogeneity; `full` for merges too.

    Raises:
        RecipeError: when mergekit cannot read or plan it. A tensor that cannot be read or merged does not raise: its
            report says so.
    """
    with planned(read_recipe(recipe), options or MergeOptions()) as plan:
        return assemble(plan, inspect_tensors(plan, plan.tensors, mode), mode)


def inspect_tensors(
    plan: Plan, tensors: Sequence[PlannedTensor], mode: Mode, *, spectra: Collection[str] = ()
) -> Iterator[TensorReport]:
    """Each tensor's report as soon as it is measured; one tensor of every model is held at a time.

    Args:
        plan: of the merge.
        tensors: of it, those to measure.
        mode: as `inspect_recipe`.
        spectra: names of the tensors whose singular values are measured.
    """
    for tensor in tensors:
        yield from inspect_tensor(plan, tensor, mode, with_spectra=tensor.name in spectra)


def assemble(
    plan: Plan, tensors: Iterable[TensorReport], mode: Mode, *, selection: str | None = None, complete: bool = True
) -> Report:
    """The report of the tensors measured so far."""
    return Report(
        producer=f"mergekit-ace {__version__}",
        recipe=plan.recipe.name,
        method=plan.method.spec.name,
        mode=mode,
        complete=complete,
        base=str(plan.base) if plan.base else None,
        experts=tuple(str(model) for model in plan.experts),
        note=_note(plan),
        planned=len(plan.tensors),
        selection=selection,
        tensors=tuple(tensors),
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
    return header.elements * (1 + min(header.shape[-2:]) // 8 if mode == "full" and _may_be_merged(tensor) else 1)


def spectra_of_each_type(tensors: Sequence[PlannedTensor]) -> list[PlannedTensor]:
    """The tensors whose spectra are shown unless others are asked for: the middle one of each type of matrix."""
    return sample([tensor for tensor in tensors if _may_be_merged(tensor)], 1)[:_MOST_SPECTRA]


def _may_be_merged(tensor: PlannedTensor) -> bool:
    """A matrix, or a stack of them, outside the vocabulary."""
    try:
        header = tensor.header(tensor.base or tensor.experts[0])
    except READING:
        return False
    return header is not None and len(header.shape) > 1 and tensor.vocabulary_axis is None


def inspect_tensor(
    plan: Plan, tensor: PlannedTensor, mode: Mode, *, with_spectra: bool = False
) -> Iterator[TensorReport]:
    """One planned tensor: no report if no model has it, one for each matrix of a stack, else one."""
    started = time.perf_counter()
    where = place(tensor.name)
    report = TensorReport(name=tensor.name, depth=where.depth, kind=where.kind, shape=(), treatment="failed", reason="")
    try:
        inputs = tensor.load()
        if inputs is None:
            return
        report = _with(report, shape=tuple(inputs.group.entries[0].tensor.shape))
        for measured in _measured(plan.method, report, inputs, mode, with_spectra=with_spectra):
            yield _with(measured, seconds=time.perf_counter() - started)
            started = time.perf_counter()
    except READING as error:
        yield _with(
            report, reason="the merge stops here", error=message_of(error), seconds=time.perf_counter() - started
        )


def inspect_inputs(method: MergeMethod, name: str, inputs: Inputs, mode: Mode) -> Iterator[TensorReport]:
    """One tensor in memory: a report for each matrix of a stack, else one.

    Raises:
        ValueError, RuntimeError: as the merge.
    """
    started, where = time.perf_counter(), place(name)
    shape = tuple(inputs.group.entries[0].tensor.shape)
    report = TensorReport(name=name, depth=where.depth, kind=where.kind, shape=shape, treatment="failed", reason="")
    for measured in _measured(method, report, inputs, mode, with_spectra=False):
        yield _with(measured, seconds=time.perf_counter() - started)
        started = time.perf_counter()


def _measured(
    method: MergeMethod, report: TensorReport, inputs: Inputs, mode: Mode, *, with_spectra: bool
) -> Iterator[TensorReport]:
    if inputs.is_buffer:
        yield _with(report, treatment="copied", reason="not floating point")
        return
    if not isinstance(method, LayerwiseMethod):
        yield _foreign(report, method.spec.name, inputs.group)
        return
    tensor = method.treated(inputs.group, report.name, inputs.parameters)
    report = _with(report, reason=tensor.treatment.reason)
    if tensor.treatment.kind == "buffer":
        yield _with(report, treatment="copied")
    elif tensor.treatment.kind == "base":
        yield _kept(report, tensor.base, tensor.experts)
    elif tensor.treatment.kind == "average":
        yield _averaged(report, tensor.base, tensor.experts)
    else:
        for matrix in method.matrices(tensor):
            task_vectors = matrix.task_vectors(matrix.cores())
            part = _with(report, name=matrix.name, shape=tuple(tensor.base.shape[-2:]))
            with_these = with_spectra and not any(matrix.place)
            yield measure_matrix(part, method, task_vectors, tensor.parameters, mode, with_spectra=with_these)


def measure_matrix(
    report: TensorReport,
    method: LayerwiseMethod,
    task_vectors: TaskVectors,
    parameters: Mapping[str, Any],
    mode: Mode,
    *,
    with_spectra: bool,
) -> TensorReport:
    """A tensor's report with the norms of its task vectors and, unless the mode is `fast`, with its merge."""
    report = _with(report, **norms(task_vectors), dtype=str(task_vectors.dtype).rpartition(".")[2])
    if not len(task_vectors):
        return _with(report, treatment="unchanged")
    if len(task_vectors) > 1:
        report = _with(report, treatment="merged", gate=method.gate(parameters), parameters=method.settings(parameters))
    else:
        report = _with(report, treatment="single expert")
    if mode == "fast":
        return report
    with diagnostics():
        merge = method.merge(task_vectors, parameters)
    return _with(report, **merge_fields(task_vectors, merge, method.scale(parameters), with_spectra=with_spectra))


def _kept(report: TensorReport, base: Tensor, experts: Sequence[Expert]) -> TensorReport:
    require_finite_base(base, name=report.name)
    report = _with(report, treatment="base")
    try:
        return _with(report, **norms(_columns(base, experts, report.name)))
    except ValueError:  # the merge looks at no expert here
        return report


def _averaged(report: TensorReport, base: Tensor, experts: Sequence[Expert]) -> TensorReport:
    task_vectors = _columns(base, experts, report.name)
    return _with(report, treatment="average" if len(task_vectors) else "unchanged", **norms(task_vectors))


def _foreign(report: TensorReport, method: str, group: TensorGroup) -> TensorReport:
    report = _with(report, treatment="merged", reason=f"merged by {method}")
    if group.base is None:
        return report
    experts = [Expert(name=str(entry.id), tensor=entry.tensor) for entry in group.non_base]
    return _with(report, **norms(_columns(group.base.tensor, experts, report.name)))


def _columns(base: Tensor, experts: Sequence[Expert], name: str) -> TaskVectors:
    """Any tensor as one column: norms need no shape, and the mean row that `TaskVectors` takes is then one number."""
    columns = [replace(expert, tensor=expert.tensor.reshape(-1, 1)) for expert in experts]
    return StoredTaskVectors(base.reshape(-1, 1), columns, name=name)


def _note(plan: Plan) -> str | None:
    name = plan.method.spec.name
    if not isinstance(plan.method, LayerwiseMethod):
        return f"{name} is not a method of mergekit-ace: the updates' norms are shown, but not what it makes of them."
    return None


def _with(report: TensorReport, **fields: Any) -> TensorReport:
    return report.model_copy(update=fields)
