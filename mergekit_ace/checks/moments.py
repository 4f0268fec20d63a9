"""A recipe's `moments`: whether the folder is there, whose moments it has, and of which base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from mergekit_ace.methods.layerwise import LayerwiseMethod
from mergekit_ace.moments.index import MomentsError
from mergekit_ace.moments.load import MomentsFolder, open_moments
from mergekit_ace.recipe.failures import READING
from mergekit_ace.recipe.findings import Finding
from mergekit_ace.recipe.plan import Plan, PlannedTensor
from mergekit_ace.recipe.treatments import treated

_SAMPLES = 6
_REMEDY = "Run mergekit-ace moments with this recipe."
_T = TypeVar("_T")


def check_moments(plan: Plan) -> Iterator[Finding]:
    """Moments that are not there, or of other models; experts and matrices that keep their estimates."""
    if not isinstance(plan.method, LayerwiseMethod):
        return
    folders: dict[str, list[PlannedTensor]] = {}
    refused = None
    for tensor in plan.tensors:
        folder = tensor.shared_parameters.get("moments")
        header = tensor.header(tensor.base) if tensor.base and tensor.reads(tensor.base) else None
        if not folder or header is None:
            continue
        if treated(plan.method, tensor, header.shape).kind in ("matrix", "stack"):
            folders.setdefault(folder, []).append(tensor)
            if refused is None and not plan.method.takes_moments(tensor.shared_parameters):
                refused = tensor.name
    if refused is not None:
        yield estimates_only(refused)
    for path, tensors in folders.items():
        try:
            yield from _of_folder(plan, open_moments(Path(path)), tensors)
        except MomentsError as error:
            yield unusable(error)


def estimates_only(name: str) -> Finding:
    """A tensor's parameters take no measured second moments."""
    return Finding(
        level="error",
        what=f"{name}: the recipe's other parameters are defined of estimated second moments and take no measured ones",
        remedy="Remove moments, or preset: published, structural_prior: true, or a solver other than closed_form.",
    )


def unusable(error: MomentsError) -> Finding:
    """The merge would stop at the moments."""
    return Finding(level="error", what=str(error), remedy=_REMEDY)


def estimated(without: Sequence[str], matrices: int) -> Iterator[Finding]:
    """Matrices of which nothing is measured."""
    if without:
        yield Finding(
            level="hint",
            what=f"{len(without)} of {matrices} matrices have no measured moments ({without[0]} for one)",
            remedy="They keep the estimates from their task vectors.",
        )


def sampled(measured: Sequence[_T]) -> Sequence[_T]:
    """Of the weights that moments were measured on, those that are compared; the merge compares all."""
    return measured[:: max(1, len(measured) // _SAMPLES)]


def _of_folder(plan: Plan, folder: MomentsFolder, tensors: list[PlannedTensor]) -> Iterator[Finding]:
    known = folder.names(map(str, plan.experts))
    unknown = [name for name in folder.index.experts if name not in known.values()]
    if unknown:
        yield Finding(
            level="warning",
            what=f"{folder.folder} has moments of {', '.join(unknown)}, of which the recipe has no expert",
            remedy="Measure the moments with this recipe, if one of its experts is meant.",
        )
    without = [expert for expert, name in known.items() if name is None]
    if without:
        yield Finding(
            level="hint" if any(known.values()) else "error",
            what=f"{folder.folder} has no moments of {', '.join(without)}",
            remedy="They keep the estimates from their task vectors; give mergekit-ace moments prompts of them.",
        )
    measured = [tensor for tensor in tensors if tensor.name in folder.index.tensors]
    yield from estimated([tensor.name for tensor in tensors if tensor.name not in folder.index.tensors], len(tensors))
    for tensor in sampled(measured):
        _require_base(folder, tensor)


def _require_base(folder: MomentsFolder, tensor: PlannedTensor) -> None:
    """Refuse moments of another base.

    Raises:
        MomentsError: it is another one.
    """
    assert tensor.base is not None
    try:
        base = tensor.read(tensor.base)
    except READING:
        return  # reported by the checks of the files
    if base is None:
        return
    first = tensor.shared_parameters["input_axis"] == "first"
    entry = folder.tensor(tensor.name, base.shape, input_first=first)
    if entry is not None:
        folder.require_weight(tensor.name, base)
