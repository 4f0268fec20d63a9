"""The models of a recipe in the roles that its method gives them: the base, and the experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference
from mergekit.merge_methods.base import BasePolicy, InputContract
from mergekit.merge_methods.registry import registered_methods

from mergekit_ace.recipe.findings import Finding


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Models that are merged with each other: those of a list of models, or of one slice."""

    where: str
    base: ModelReference | None
    models: Sequence[ModelReference]
    is_slice: bool
    """mergekit adds the base to a list of models, and to no slice."""


def check_roles(document: Mapping[str, Any]) -> Iterator[Finding]:
    """A base that is missing, too few or too many experts, and models that are listed twice.

    What is no model at all is left to `check_values`.
    """
    name = document.get("merge_method")
    method = next((method for method in registered_methods() if method.spec.name == name), None)
    if method is None:
        return
    contract = method.spec.contract
    groups = list(_groups(document))
    if contract.base == BasePolicy.REQUIRED and any(group.base is None for group in groups):
        yield Finding(
            level="error",
            what=f"{name} merges what models have learned since their base model, and base_model is missing",
            remedy="Add base_model: PATH, the model that all of them were fine-tuned from.",
        )
    if contract.base == BasePolicy.FORBIDDEN and document.get("base_model") is not None:
        yield Finding(level="error", what=f"{name} takes no base_model", remedy="Remove base_model, or list it.")
    for group in groups:
        yield from _check_group(str(name), contract, group)


def models_of(document: Mapping[str, Any]) -> Sequence[ModelReference]:
    """Every model of a recipe once; empty where a list holds what is no model."""
    groups = list(_groups(document))
    bases = [group.base for group in groups if group.base is not None]
    return list(dict.fromkeys([*bases, *(model for group in groups for model in group.models)]))


def _check_group(method: str, contract: InputContract, group: _Group) -> Iterator[Finding]:
    first: dict[ModelReference, int] = {}
    folders: dict[Path, int] = {}
    for index, model in enumerate(group.models):
        folder = Path(model.model.path)
        if model in first:
            yield Finding(
                level="error",
                what=f"{group.where}[{index}] is {model}, which {group.where}[{first[model]}] is already; "
                "mergekit takes a model once",
                remedy="Keep one of them; parameters: {weight: 2} counts an expert twice.",
            )
        elif model.lora is None and folder.is_dir() and folder.resolve() in folders:
            other = folders[folder.resolve()]
            yield Finding(
                level="warning",
                what=f"{group.where}[{index}] and {group.where}[{other}] are the same folder, which counts twice",
                remedy="Keep one of them, or set its weight.",
            )
        first.setdefault(model, index)
        if model.lora is None:
            folders.setdefault(folder.resolve(), index)
    if contract.base in (BasePolicy.IGNORED, BasePolicy.FORBIDDEN) or group.base is None:
        yield from _check_count(method, group, "model", len(first), contract.min_inputs, contract.max_inputs)
        return
    if group.is_slice and group.base not in first:
        yield Finding(
            level="error",
            what=f"{group.where} must hold the base model {group.base} too; mergekit adds it to a list of models only",
            remedy=f"Add - {{model: {group.base}, layer_range: [FIRST, END]}} to it.",
        )
    inputs = len({*first, group.base})
    yield from _check_count(method, group, "model", inputs, contract.min_inputs, contract.max_inputs)
    yield from _check_count(
        method, group, "model beside the base", inputs - 1, contract.min_non_base or 0, contract.max_non_base
    )


def _check_count(method: str, group: _Group, what: str, count: int, least: int, most: int | None) -> Iterator[Finding]:
    if count < least or (most is not None and count > most):
        bound = least if count < least or most is None else most
        bounds = "exactly" if least == most else "at least" if count < least else "at most"
        noun = what if bound == 1 else what.replace("model", "models")
        yield Finding(
            level="error",
            what=f"{group.where} must have {bounds} {bound} {noun} for {method}; got {count}",
            remedy="List the models to merge.",
        )


def _groups(document: Mapping[str, Any]) -> Iterator[_Group]:
    base = _model(document.get("base_model"))
    yield from _in_module(document, "", base)
    modules = document.get("modules")
    for name, module in (modules if isinstance(modules, Mapping) else {}).items():
        if isinstance(module, Mapping):
            yield from _in_module(module, f"modules.{name}.", base)


def _in_module(module: Mapping[str, Any], prefix: str, base: ModelReference | None) -> Iterator[_Group]:
    models = _models(module.get("models"))
    if models:
        yield _Group(where=f"{prefix}models", base=base, models=models, is_slice=False)
    slices = module.get("slices")
    for index, part in enumerate(slices if isinstance(slices, list) else []):
        if isinstance(part, Mapping) and (sources := _models(part.get("sources"))):
            own = _model(part.get("base_model"))
            yield _Group(where=f"{prefix}slices[{index}].sources", base=own or base, models=sources, is_slice=True)


def _models(entries: Any) -> list[ModelReference] | None:
    """The models of a list; None where one of them is none, or the list is empty."""
    named = [
        _model(entry.get("model")) if isinstance(entry, Mapping) else None
        for entry in (entries if isinstance(entries, list) else [])
    ]
    found = [model for model in named if model is not None]
    return found if found and len(found) == len(named) else None


def _model(value: Any) -> ModelReference | None:
    try:
        return None if value is None else ModelReference.model_validate(value)
    except (ValueError, RuntimeError, TypeError, AttributeError):
        return None
