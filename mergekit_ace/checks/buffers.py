"""Tensors that are no floating-point numbers: mergekit copies them, and stops where the models differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from mergekit_ace.recipe.failures import READING
from mergekit_ace.recipe.findings import Finding
from mergekit_ace.recipe.plan import Plan, PlannedTensor

_MOST_NAMES = 3


def check_buffers(plan: Plan) -> Iterator[Finding]:
    """Buffers that differ between models."""
    differing = [tensor.name for tensor in plan.tensors if _is_buffer(tensor) and not _agree_as_read(tensor)]
    if differing:
        yield differing_buffers(differing)


def differing_buffers(names: Sequence[str]) -> Finding:
    """The finding about buffers of which the models have different values."""
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    counters = all(name.endswith("num_batches_tracked") for name in names)
    return Finding(
        level="error",
        what=f"{', '.join(names[:_MOST_NAMES])}{more} must be equal in all models, for mergekit copies what is no "
        "floating-point tensor and stops where they differ; they differ"
        + (" (BatchNorm counts the batches of its training)" if counters else ""),
        remedy="Give the experts the base's: tensors = load_file(EXPERT); tensors[NAME] = load_file(BASE)[NAME]; "
        "save_file(tensors, EXPERT, metadata={'format': 'pt'}) with safetensors.torch.",
    )


def agree(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether tensors of all models are the same, to the dtype."""
    return all(tensor.dtype == tensors[0].dtype and torch.equal(tensor, tensors[0]) for tensor in tensors[1:])


def _agree_as_read(tensor: PlannedTensor) -> bool:
    """Whether mergekit has nothing to stop at: with `dtype` set, it reads buffers as floating point and merges them."""
    values = _values(tensor)
    return all(value.is_floating_point() for value in values) or agree(values)


def _is_buffer(tensor: PlannedTensor) -> bool:
    models = [model for model in (tensor.base, *tensor.experts) if model is not None and tensor.reads(model)]
    headers = [tensor.header(model) for model in models]
    return any(header is not None and not header.dtype.is_floating_point for header in headers)


def _values(tensor: PlannedTensor) -> list[torch.Tensor]:
    values: list[torch.Tensor] = []
    for model in (tensor.base, *tensor.experts):
        if model is None or not tensor.reads(model):
            continue
        try:
            value = tensor.read(model)
        except READING:  # what cannot be read is found by the checks of files and tensors
            continue
        if value is not None:
            values.append(value)
    return values
