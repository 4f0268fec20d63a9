"""What a recipe says and mergekit passes over: keys and parameters nobody reads, filters that match nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from mergekit.common import ModelReference
from mergekit.config import (
    ConditionalParameter,
    InputModelDefinition,
    InputSliceDefinition,
    MergeConfiguration,
    OutputModuleDefinition,
    OutputSliceDefinition,
    ParameterSetting,
)
from mergekit.merge_methods.base import ParameterScope
from mergekit.merge_methods.registry import registered_methods
from mergekit.tokenizer.config import TokenizerConfig
from pydantic import BaseModel

from mergekit_ace.recipe.findings import Finding
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


def check_method(name: str) -> Iterator[Finding]:
    """A merge method that mergekit does not have."""
    known = [method.spec.name for method in registered_methods()]
    if name not in known:
        yield Finding(
            level="error",
            what=f"merge_method must be one of mergekit's or of its plugins; got {name!r}",
            remedy=_nearest(name, known) or f"Known: {', '.join(sorted(known))}.",
        )


def check_keys(document: Mapping[str, Any]) -> Iterator[Finding]:
    """Keys that mergekit does not read."""
    yield from _unread(document, MergeConfiguration, "the recipe")
    yield from _unread_in_slices(document.get("slices"), "slices")
    yield from _unread_in_list(document.get("models"), InputModelDefinition, "models")
    if isinstance(document.get("tokenizer"), Mapping):
        yield from _unread(document["tokenizer"], TokenizerConfig, "tokenizer")
    modules = document.get("modules")
    for name, module in (modules if isinstance(modules, Mapping) else {}).items():
        if isinstance(module, Mapping):
            yield from _unread(module, OutputModuleDefinition, f"modules.{name}")
            yield from _unread_in_list(module.get("models"), InputModelDefinition, f"modules.{name}.models")
            yield from _unread_in_slices(module.get("slices"), f"modules.{name}.slices")


def check_parameters(config: MergeConfiguration) -> Iterator[Finding]:
    """Parameters that the method does not know, or that stand where nothing reads them."""
    method = next((method for method in registered_methods() if method.spec.name == config.merge_method), None)
    if method is None:
        return
    known = {parameter.name: parameter for parameter in method.spec.parameters}
    for block in settings_of(config):
        for name, setting in block.values.items():
            if setting == []:
                yield Finding(
                    level="error",
                    what=f"{block.where}: {name} is an empty list; mergekit takes the default in silence",
                    remedy=f"Give {name} a value, or remove it.",
                )
            if name not in known:
                yield Finding(
                    level="error",
                    what=f"{block.where}: {method.spec.name} has no parameter {name!r}; mergekit ignores it in silence",
                    remedy=_nearest(name, known) or f"It has: {', '.join(known)}.",
                )
            elif block.model is not None and known[name].scope == ParameterScope.SHARED:
                yield Finding(
                    level="error",
                    what=f"{block.where}: {name} is one value for all models; mergekit ignores it under {block.model}",
                    remedy=f"Move {name} to the recipe's own parameters.",
                )
            elif block.model == config.base_model and block.model and known[name].scope == ParameterScope.NON_BASE:
                yield Finding(
                    level="warning",
                    what=f"{block.where}: {name} has no effect on the base model {block.model}",
                    remedy="Remove it; only the experts have one.",
                )


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
                remedy=_nearest(entry.filter, parts) or "A filter is a part of a tensor's name, not a pattern.",
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


def _unread_in_slices(slices: Any, where: str) -> Iterator[Finding]:
    yield from _unread_in_list(slices, OutputSliceDefinition, where)
    for index, part in enumerate(slices if isinstance(slices, list) else []):
        if isinstance(part, Mapping):
            yield from _unread_in_list(part.get("sources"), InputSliceDefinition, f"{where}[{index}].sources")


def _unread_in_list(entries: Any, schema: type[BaseModel], where: str) -> Iterator[Finding]:
    for index, entry in enumerate(entries if isinstance(entries, list) else []):
        if isinstance(entry, Mapping):
            yield from _unread(entry, schema, f"{where}[{index}]")


def _unread(document: Mapping[str, Any], schema: type[BaseModel], where: str) -> Iterator[Finding]:
    known = schema.model_fields
    for key in document:
        if str(key) not in known:
            near = _nearest(str(key), known)
            yield Finding(
                level="error" if near else "warning",
                what=f"mergekit does not read {key!r} in {where}",
                remedy=near or f"It reads: {', '.join(known)}.",
            )


def _nearest(name: str, known: Iterable[str]) -> str | None:
    matches = get_close_matches(name, list(known), n=1)
    return f"Did you mean {matches[0]}?" if matches else None
