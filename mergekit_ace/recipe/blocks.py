"""Every `parameters:` block of a recipe as it is written, whatever mergekit makes of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Block:
    """One `parameters:` block."""

    where: str
    model: Any
    """What stands beside it as `model`; None for a block that all models share."""
    values: Any
    """A mapping, if it is what it must be."""


def blocks_of(document: Mapping[str, Any]) -> Iterator[Block]:
    """Every block, the recipe's own first."""
    yield Block(where="parameters", model=None, values=document.get("parameters"))
    yield from _of_models("models", document.get("models"))
    yield from _of_slices("slices", document.get("slices"))
    modules = document.get("modules")
    for name, module in (modules if isinstance(modules, Mapping) else {}).items():
        if isinstance(module, Mapping):
            yield Block(where=f"modules.{name}", model=None, values=module.get("parameters"))
            yield from _of_models(f"modules.{name}.models", module.get("models"))
            yield from _of_slices(f"modules.{name}.slices", module.get("slices"))


def _of_models(where: str, models: Any) -> Iterator[Block]:
    for index, entry in enumerate(models if isinstance(models, list) else []):
        if isinstance(entry, Mapping):
            yield Block(where=f"{where}[{index}]", model=entry.get("model", ""), values=entry.get("parameters"))


def _of_slices(where: str, slices: Any) -> Iterator[Block]:
    for index, part in enumerate(slices if isinstance(slices, list) else []):
        if not isinstance(part, Mapping):
            continue
        yield Block(where=f"{where}[{index}]", model=None, values=part.get("parameters"))
        yield from _of_models(f"{where}[{index}].sources", part.get("sources"))
