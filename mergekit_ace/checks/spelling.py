"""What mergekit ignores in a recipe: keys and parameters that it does not read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mergekit.config import (
    InputModelDefinition,
    InputSliceDefinition,
    MergeConfiguration,
    OutputModuleDefinition,
    OutputSliceDefinition,
)
from mergekit.merge_methods.base import ParameterScope, ParameterSpec
from mergekit.merge_methods.registry import registered_methods
from mergekit.tokenizer.config import TokenEmbeddingConfig, TokenizerConfig
from pydantic import BaseModel

from mergekit_ace.recipe.blocks import blocks_of
from mergekit_ace.recipe.findings import Finding
from mergekit_ace.recipe.nearest_name import did_you_mean, nearest
from mergekit_ace.recipe.parameter_values import parameters_of

_MOST_NAMES = 3


def check_keys(document: Mapping[str, Any]) -> Iterator[Finding]:
    """Keys that mergekit does not read."""
    parameters = parameters_of(document) or {}
    for where, entry, schema in _entries(document):
        for key in entry:
            if str(key) not in schema.model_fields:
                yield _unread(str(key), where, schema, parameters)


def check_parameters(document: Mapping[str, Any]) -> Iterator[Finding]:
    """Parameters that the method does not know, or that stand where nothing reads them."""
    method, known = document.get("merge_method"), parameters_of(document)
    if known is None:
        return
    for block in blocks_of(document):
        for name in block.values if isinstance(block.values, Mapping) else ():
            if name not in known:
                yield Finding(
                    level="error",
                    what=f"{block.where}: {method} has no parameter {name!r}; mergekit ignores it without a message",
                    remedy=_of_others(str(name), str(method))
                    or did_you_mean(str(name), known)
                    or f"It has: {', '.join(known)}.",
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


def _of_others(name: str, method: str) -> str | None:
    """Whose parameter it is, where it is one of other methods: a recipe that was written for one of them."""
    others = [
        other.spec.name
        for other in registered_methods()
        if other.spec.name != method and any(parameter.name == name for parameter in other.spec.parameters)
    ]
    return f"Remove it: it is a parameter of {', '.join(sorted(others)[:_MOST_NAMES])}." if others else None


def _entries(document: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[Any, Any], type[BaseModel]]]:
    """Every mapping of a recipe that mergekit reads by a schema of its own, and where it stands."""
    yield "the recipe", document, MergeConfiguration
    yield from _in_slices(document.get("slices"), "slices")
    yield from _in_list(document.get("models"), InputModelDefinition, "models")
    tokenizer = document.get("tokenizer")
    if isinstance(tokenizer, Mapping):
        yield "tokenizer", tokenizer, TokenizerConfig
        tokens = tokenizer.get("tokens")
        for token, entry in (tokens if isinstance(tokens, Mapping) else {}).items():
            if isinstance(entry, Mapping):
                yield f"tokenizer.tokens: {token}", entry, TokenEmbeddingConfig
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
