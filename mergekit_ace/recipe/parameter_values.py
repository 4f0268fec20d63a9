"""The values that a recipe gives to the parameters of its method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mergekit.merge_methods.base import ParameterSpec
from mergekit.merge_methods.registry import registered_methods
from pydantic import ValidationError

from mergekit_ace.methods.parameters import RecipeParameter
from mergekit_ace.recipe.blocks import blocks_of
from mergekit_ace.recipe.findings import Finding
from mergekit_ace.recipe.nearest_name import nearest


def parameters_of(document: Mapping[str, Any]) -> Mapping[str, ParameterSpec] | None:
    """The parameters of a recipe's method by name, or of the one that is meant; None where there is none."""
    methods = {method.spec.name: method for method in registered_methods()}
    wanted = document.get("merge_method")
    if not isinstance(wanted, str) or (meant := wanted if wanted in methods else nearest(wanted, methods)) is None:
        return None
    return {parameter.name: parameter for parameter in methods[meant].spec.parameters}


def check_parameter_values(document: Mapping[str, Any]) -> Iterator[Finding]:
    """Values that the method refuses."""
    known = parameters_of(document) or {}
    for block in blocks_of(document):
        for name, setting in block.values.items() if isinstance(block.values, Mapping) else ():
            if name in known:
                yield from _refused(block.where, known[name], setting)


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
            # Our parameters have a requirement in words; of mergekit's own only the type is known.
            words = error.errors()[0]["msg"].removeprefix("Value error, ")
            if not isinstance(parameter, RecipeParameter):
                words = f"parameter {parameter.name} must be {_type_name(parameter.value_type)}; got {value!r}"
            yield Finding(level="error", what=f"{where}: {words}", remedy="Correct the value.")


def _type_name(kind: Any) -> str:
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}
    return names.get(kind, str(kind).replace("typing.", ""))
