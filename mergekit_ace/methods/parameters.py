"""Recipe parameters: their types, ranges and error messages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from mergekit.merge_methods.base import ParameterScope, ParameterSpec
from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# Infinity is a threshold that nothing crosses.
Threshold = Annotated[float, Field(ge=0, allow_inf_nan=True)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class RecipeParameter(ParameterSpec):
    """mergekit's parameter, and what its value must be, in words."""

    requirement: str = ""


def parameter(
    name: str,
    value_type: Any,
    *,
    default: Any,
    requirement: str,
    description: str,
    scope: ParameterScope = ParameterScope.SHARED,
) -> RecipeParameter:
    """A recipe parameter whose errors name it and what it must be; mergekit's own name neither.

    Args:
        name: as in the recipe.
        value_type: anything that pydantic validates.
        default: value where the recipe has none.
        requirement: completes "parameter <name> must be ...".
        description: for `mergekit-ace methods`.
        scope: shared by all inputs, or given per expert.
    """
    checked = Annotated[value_type, WrapValidator(_naming(name, requirement))]
    return RecipeParameter(name, checked, scope, default=default, description=description, requirement=requirement)


def _naming(name: str, requirement: str) -> Callable[[Any, ValidatorFunctionWrapHandler], Any]:
    def validate(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            validated = handler(value)
        except ValidationError:
            validated = None
        # Python counts True as the number 1; a recipe with `epsilon: true` does not mean that.
        if validated is None or (isinstance(value, bool) and not isinstance(validated, bool)):
            raise ValueError(f"parameter {name} must be {requirement}; got {value!r}")
        return validated

    return validate


RIDGE = parameter(
    "epsilon",
    Positive | Literal["auto"],
    default="auto",
    requirement="a finite number above 0, or 'auto'",
    description="ridge of the second moments, absolute, or 'auto': estimated from the task vectors",
)
MOMENTS = parameter(
    "moments",
    str,
    default="",
    requirement="a folder that mergekit-ace moments wrote",
    description="a folder of second moments measured on prompts, in place of the estimates; empty: estimates alone",
)
WEIGHT = parameter(
    "weight",
    NonNegative,
    default=1.0,
    scope=ParameterScope.NON_BASE,
    requirement="a finite number of at least 0",
    description="the expert's weight in the objective; only ratios count, 0 leaves the expert out",
)
LAMBDA = parameter(
    "lambda",
    Number,
    default=1.0,
    requirement="a finite number",
    description="scale of the merged task vector",
)
INPUT_AXIS = parameter(
    "input_axis",
    Literal["last", "first"],
    default="last",
    requirement="'last' or 'first'",
    description="which axis of a stored matrix is the layer's input; 'first' for GPT-2's Conv1D",
)


def matrices_parameter(method: str) -> RecipeParameter:
    """`matrices`, by filter a way to confine the method to some layers."""
    return parameter(
        "matrices",
        Literal[method, "average", "base"],
        default=method,
        requirement=f"'{method}', 'average' or 'base'",
        description="treatment of matrices that are neither embedding table nor output head",
    )


def embeddings_parameter(method: str, *, heads: bool) -> RecipeParameter:
    """`embeddings`, whose last choice is the method itself; `auto` for a method that merges output heads."""
    if heads:
        return parameter(
            "embeddings",
            Literal["auto", "average", "base", method],
            default="auto",
            requirement=f"'auto', 'average', 'base' or '{method}'",
            description="treatment of token, position and token-type tables and of the output head; 'auto': the output "
            "head, also one tied to the token table, as a linear map, and all others averaged",
        )
    return parameter(
        "embeddings",
        Literal["average", "base", method],
        default="average",
        requirement=f"'average', 'base' or '{method}'",
        description="treatment of token, position and token-type tables and of the output head",
    )


def common_parameters(
    method: str, *, scale: RecipeParameter = LAMBDA, heads: bool = False
) -> tuple[RecipeParameter, ...]:
    """The parameters that every method of this package has.

    Args:
        method: its name, which is also the choice of the method itself for `matrices` and `embeddings`.
        scale: its `lambda`.
        heads: whether it merges output heads, by `embeddings: auto`.
    """
    return (WEIGHT, scale, matrices_parameter(method), embeddings_parameter(method, heads=heads), INPUT_AXIS)
