"""NaN and infinity in the models' weights, found before a merge stops at them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from mergekit.common import ModelReference

from mergekit_ace.checkpoints.sources import is_local
from mergekit_ace.linalg.precision import all_finite
from mergekit_ace.methods.layerwise import LayerwiseMethod
from mergekit_ace.recipe.failures import READING
from mergekit_ace.recipe.findings import Finding
from mergekit_ace.recipe.plan import Plan, PlannedTensor
from mergekit_ace.recipe.treatments import treated
from mergekit_ace.tensor_treatment import is_buffer

_MOST_NAMES = 3
# Bytes that are read, the smallest tensors first: all of a small model, the vectors of a large one.
_MOST_BYTES = 1 << 30


def check_finite(plan: Plan) -> Iterator[Finding]:
    """Models whose weights hold NaN or infinity, as far as up to a gibibyte of them shows."""
    damaged: dict[ModelReference, list[str]] = defaultdict(list)
    left = _MOST_BYTES
    for size, tensor, model in sorted(_read_by_the_merge(plan), key=lambda entry: entry[0]):
        left -= size
        if left < 0:
            break
        if not _is_finite(tensor, model):
            damaged[model].append(tensor.name)
    for model, names in damaged.items():
        more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        yield Finding(
            level="error",
            what=f"{model} holds NaN or infinity in {', '.join(names[:_MOST_NAMES])}{more}",
            remedy="Repair or replace that checkpoint.",
        )


def _read_by_the_merge(plan: Plan) -> Iterator[tuple[int, PlannedTensor, ModelReference]]:
    """Every tensor of every model that has a part in the merged one, with its bytes; adapters have their own checks."""
    for tensor in plan.tensors:
        if is_buffer(tensor.name):
            continue
        models = [model for model in (tensor.base, *_with_weight(tensor)) if model is not None and tensor.reads(model)]
        header = next((header for model in models if (header := tensor.header(model)) is not None), None)
        kept = (
            header is not None
            and isinstance(plan.method, LayerwiseMethod)
            and treated(plan.method, tensor, header.shape).kind == "base"
        )
        for model in models:
            found = tensor.header(model)
            if found is None or not found.dtype.is_floating_point or (kept and model != tensor.base):
                continue
            if model.lora is None and is_local(model.model):
                yield found.bytes, tensor, model


def _with_weight(tensor: PlannedTensor) -> Iterator[ModelReference]:
    for model in tensor.experts:
        if tensor.input_parameters(model).get("weight") != 0:
            yield model


def _is_finite(tensor: PlannedTensor, model: ModelReference) -> bool:
    try:
        values = tensor.read(model)
    except READING:  # reported by the checks of files and tensors
        return True
    return values is None or all_finite(values)
