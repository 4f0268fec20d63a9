"""What a tensor costs to merge, relative to others: for the order of work and the time that is left."""

from __future__ import annotations

from mergekit.common import ModelReference

from mergekit_ace.matrix.workload import multiply_adds
from mergekit_ace.methods.layerwise import LayerwiseMethod
from mergekit_ace.recipe.plan import Plan, PlannedTensor

# A machine of no particular kind: only the ratios matter.
_MULTIPLY_ADDS_A_SECOND = 5e10
_BYTES_A_SECOND = 1e9
# A float64 eigendecomposition in float32 multiply-adds, over its size cubed.
_EIGENDECOMPOSITION = 12


def tensor_cost(plan: Plan, tensor: PlannedTensor) -> float:
    """Seconds of reading and arithmetic."""
    models = [model for model in (tensor.base, *tensor.experts) if model is not None and tensor.reads(model)]
    sizes = [header.bytes for model in models if (header := tensor.header(model)) is not None]
    output = tensor.output
    if output is None:
        return 0.0
    # A tensor that mergekit converts has no header of its own.
    read = sum(sizes) if sizes else output.bytes * len(models)
    return (read + output.bytes) / _BYTES_A_SECOND + _arithmetic(plan, tensor, models) / _MULTIPLY_ADDS_A_SECOND


def _arithmetic(plan: Plan, tensor: PlannedTensor, models: list[ModelReference]) -> float:
    output = tensor.output
    assert output is not None
    if not isinstance(plan.method, LayerwiseMethod) or len(models) < 2:
        return float(output.elements * len(models))
    parameters = tensor.shared_parameters
    kind = plan.method.treat(tensor.name, output.shape, tensor.vocabulary_axis, parameters).kind
    if kind not in ("matrix", "stack"):
        return float(output.elements * len(models))
    m, n = output.shape[-2:] if parameters["input_axis"] == "last" else (output.shape[-1], output.shape[-2])
    count = output.shape[0] if kind == "stack" else 1
    return count * (multiply_adds(m, n, len(models) - 1) + _EIGENDECOMPOSITION * min(m, n) ** 3)
