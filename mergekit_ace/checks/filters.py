"""Filters of a recipe against the tensors of its plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from mergekit.common import ModelReference
from mergekit.config import (
    ConditionalParameter,
    InputModelDefinition,
    MergeConfiguration,
    OutputSliceDefinition,
    ParameterSetting,
)

from mergekit_ace.recipe.findings import Finding
from mergekit_ace.recipe.nearest_name import did_you_mean
from mergekit_ace.recipe.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One `parameters:` block."""

    where: str
    model: ModelReference | None
    """The model it belongs to; None for a block that is shared."""
    values: Mapping[str, ParameterSetting]


def settings_of(config: MergeConfiguration) -> Iterator[Settings]:
    """Every `parameters:` block of a recipe."""
    yield Settings(where="parameters", model=None, values=config.parameters or {})
    yield from _of_models("models", config.models)
    yield from _of_slices("slices", config.slices)
    for name, module in (config.modules or {}).items():
        yield Settings(where=f"modules.{name}", model=None, values=module.parameters or {})
        yield from _of_models(f"modules.{name}.models", module.models)
        yield from _of_slices(f"modules.{name}.slices", module.slices)


def check_filters(plan: Plan) -> Iterator[Finding]:
    """Filters that match no tensor, and those that an earlier entry leaves nothing to decide."""
    for block in settings_of(plan.recipe.config):
        names = {tensor.name for tensor in plan.tensors if block.model is None}
        names |= {
            tensor.input_name(model)
            for tensor in plan.tensors
            for model in (tensor.experts if block.model is None else [block.model])
            if tensor.reads(model)
        }
        for parameter, setting in block.values.items():
            yield from _filters(block.where, parameter, setting, names)


def _filters(where: str, parameter: str, setting: ParameterSetting, names: Iterable[str]) -> Iterator[Finding]:
    entries = setting if isinstance(setting, list) else [setting]
    decided = False
    for entry in entries:
        if not isinstance(entry, ConditionalParameter):
            continue
        if decided:
            yield Finding(
                level="warning",
                what=f"{where}: the entry {entry.filter or 'without filter'!r} of {parameter} is never reached: an "
                "earlier entry without filter decides for every tensor",
                remedy="Put the entry without filter last.",
            )
        elif entry.filter in (None, "*"):
            decided = True
        elif not any(entry.filter in name for name in names):
            parts = {part for name in names for part in name.split(".")}
            yield Finding(
                level="warning",
                what=f"{where}: the filter {entry.filter!r} of {parameter} matches no tensor",
                remedy=did_you_mean(entry.filter, parts) or "A filter is a part of a tensor's name, not a pattern.",
            )


def _of_models(where: str, models: Sequence[InputModelDefinition] | None) -> Iterator[Settings]:
    for index, entry in enumerate(models or []):
        yield Settings(where=f"{where}[{index}]", model=entry.model, values=entry.parameters or {})


def _of_slices(where: str, slices: Sequence[OutputSliceDefinition] | None) -> Iterator[Settings]:
    for index, part in enumerate(slices or []):
        yield Settings(where=f"{where}[{index}]", model=None, values=part.parameters or {})
        for number, source in enumerate(part.sources):
            yield Settings(
                where=f"{where}[{index}].sources[{number}]", model=source.model, values=source.parameters or {}
            )
