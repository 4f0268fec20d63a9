"""What mergekit ignores in a recipe: keys and parameters that it does not read, filters that match nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from mergekit.merge_methods.base import ParameterScope, ParameterSpec
from mergekit.merge_methods.registry import registered_methods
from mergekit.tokenizer.config import TokenizerConfig
from pydantic import BaseModel, ValidationError

from mergekit_ace.methods.parameters import RecipeParameter
from mergekit_ace.recipe.blocks import blocks_of
from mergekit_ace.recipe.findings import Finding
from mergekit_ace.recipe.nearest import did_you_mean, nearest
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


def check_keys(document: Mapping[str, Any]) -> Iterator[Finding]:
    """Keys that mergekit does not read."""
    parameters = _parameters(document) or {}
    for where, entry, schema in _entries(document):
        for key in entry:
            if str(key) not in schema.model_fields:
                yield _unread(str(key), where, schema, parameters)


def check_parameters(document: Mapping[str, Any]) -> Iterator[Finding]:
    """Parameters that the method does not know, or that stand where nothing reads them."""
    method, known = document.get("merge_method"), _parameters(document)
    if known is None:
        return
    for block in blocks_of(document):
        for name in block.values if isinstance(block.values, Mapping) else ():
            if name not in known:
                yield Finding(
                    level="error",
                    what=f"{block.where}: {method} has no parameter {name!r}; mergekit ignores it without a message",
                    remedy=did_you_mean(str(name), known) or f"It has: {', '.join(known)}.",
                )
            elif block.model is not None and known[name].scope == ParameterScope.SHARED:
                yield Finding(
                    level="error",
                    what=f"{block.where}: {name} is one value for all models; mergekit ignores it under {block.model}",
                    remedy=f"Move {name} to the recipe's own parameters.",
                )
            elif (
                block.model
                and block.model == document.get("base_model")
                and known[name].scope == ParameterScope.NON_BASE
            ):
                yield Finding(
                    level="warning",
                    what=f"{block.where}: {name} has no effect on the base model {block.model}",
                    remedy="Remove it; only the experts have one.",
                )


def check_parameter_values(document: Mapping[str, Any]) -> Iterator[Finding]:
    """Values that the method refuses."""
    known = _parameters(document) or {}
    for block in blocks_of(document):
        for name, setting in block.values.items() if isinstance(block.values, Mapping) else ():
            if name in known:
                yield from _refused(block.where, known[name], setting)


def _parameters(document: Mapping[str, Any]) -> Mapping[str, ParameterSpec] | None:
    """The parameters of a recipe's method by name; None where there is no such method."""
    wanted = document.get("merge_method")
    method = next((method for method in registered_methods() if method.spec.name == wanted), None)
    return None if method is None else {parameter.name: parameter for parameter in method.spec.parameters}


def _refused(where: str, parameter: ParameterSpec, setting: Any) -> Iterator[Finding]:
    entries = setting if isinstance(setting, list) else [setting]
    values: list[Any] = []
    for entry in entries:
        value = entry.get("value") if isinstance(entry, Mapping) else entry
        values += value if isinstance(value, list) else [value]
    for value in dict.fromkeys(value for value in values if isinstance(value, bool | int | float | str)):
        try:
            parameter.validate(value)
        except ValidationError as error:
            # Ours say what the value must be; of mergekit's own only the type is known.
            words = error.errors()[0]["msg"].removeprefix("Value error, ")
            if not isinstance(parameter, RecipeParameter):
                words = f"parameter {parameter.name} must be {_type_name(parameter.value_type)}; got {value!r}"
            yield Finding(level="error", what=f"{where}: {words}", remedy="Correct the value.")


def _type_name(kind: Any) -> str:
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}
    return names.get(kind, str(kind).replace("typing.", ""))


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


def _entries(document: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[Any, Any], type[BaseModel]]]:
    """Every mapping of a recipe that mergekit reads by a schema of its own, and where it stands."""
    yield "the recipe", document, MergeConfiguration
    yield from _in_slices(document.get("slices"), "slices")
    yield from _in_list(document.get("models"), InputModelDefinition, "models")
    if isinstance(document.get("tokenizer"), Mapping):
        yield "tokenizer", document["tokenizer"], TokenizerConfig
    modules = document.get("modules")
    for name, module in (modules if isinstance(modules, Mapping) else {}).items():
        if isinstance(module, Mapping):
            yield f"modules.{name}", module, OutputModuleDefinition
            yield from _in_list(module.get("models"), InputModelDefinition, f"modules.{name}.models")
            yield from _in_slices(module.get("slices"), f"modules.{name}.slices")


def _in_slices(slices: Any, where: str) -> Iterator[tuple[str, Mapping[Any, Any], type[BaseModel]]]:
    yield from _in_list(slices, OutputSliceDefinition, where)
    for index, part in enumerate(slices if isinstance(slices, list) else []):
        if isinstance(part, Mapping):
            yield from _in_list(part.get("sources"), InputSliceDefinition, f"{where}[{index}].sources")


def _in_list(
    entries: Any, schema: type[BaseModel], where: str
) -> Iterator[tuple[str, Mapping[Any, Any], type[BaseModel]]]:
    for index, entry in enumerate(entries if isinstance(entries, list) else []):
        if isinstance(entry, Mapping):
            yield f"{where}[{index}]", entry, schema


def _unread(key: str, where: str, schema: type[BaseModel], parameters: Mapping[str, ParameterSpec]) -> Finding:
    what = f"mergekit does not read {key!r} in {where}"
    near = did_you_mean(key, schema.model_fields)
    meant = nearest(key, parameters) if "parameters" in schema.model_fields and not near else None
    if meant is not None:
        return Finding(level="error", what=what, remedy=f"Put it under parameters: parameters: {{{meant}: VALUE}}.")
    return Finding(
        level="error" if near else "warning",
        what=what,
        remedy=near or f"It reads: {', '.join(schema.model_fields)}.",
    )
