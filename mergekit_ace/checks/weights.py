"""The experts' weights in a recipe, once mergekit has resolved filters and gradients."""

from __future__ import annotations

from collections.abc import Iterator

from mergekit_ace.methods.layerwise import LayerwiseMethod
from mergekit_ace.recipe.findings import Finding
from mergekit_ace.recipe.plan import Plan, PlannedTensor


def check_weights(plan: Plan) -> Iterator[Finding]:
    """Tensors in which every expert has weight 0."""
    names = [tensor.name for tensor in plan.tensors if _is_empty(tensor)]
    if not names:
        return
    ours = isinstance(plan.method, LayerwiseMethod)
    what = (
        "every tensor"
        if len(names) == len(plan.tensors)
        else f"{names[0]}" + (f" and {len(names) - 1} more tensors" if len(names) > 1 else "")
    )
    yield Finding(
        level="error" if ours else "warning",
        what=f"every expert has weight 0 in {what}, which leaves nothing to merge there",
        remedy="Give one of them a weight above 0"
        + ("; matrices: base and embeddings: base, by a filter, keep tensors as in the base." if ours else "."),
    )


def _is_empty(tensor: PlannedTensor) -> bool:
    weights = [tensor.input_parameters(model).get("weight") for model in tensor.experts]
    return bool(weights) and all(isinstance(weight, int | float) and weight == 0 for weight in weights)
