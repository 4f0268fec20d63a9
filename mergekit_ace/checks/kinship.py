"""Whether the experts are fine-tunes of the base, by their weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from mergekit.common import ModelReference

from mergekit_ace.matrix.storage_rounding import first_look, roundings_of_the_base, storage_floors, storage_formats
from mergekit_ace.recipe.failures import READING
from mergekit_ace.recipe.findings import Finding
from mergekit_ace.recipe.plan import Plan, PlannedTensor

_SAMPLES = 6
# Fine-tuning leaves a cosine with the base close to 1; models trained from different random weights have one near 0.
_UNRELATED = 0.2
_DISTANT = 0.7


def check_kinship(plan: Plan) -> Iterator[Finding]:
    """Experts that are the base itself, and experts of another base.

    Reads a few matrices spread over the depth; of an expert that equals the base in all of those, the whole. Adapters
    are passed over: they are updates of their base by what they are.
    """
    for expert in plan.experts:
        if expert.lora is not None or plan.base is None or plan.base.lora is not None:
            continue
        samples = _samples(plan, expert)
        cosines = [cosine for tensor in samples if (cosine := _cosine(tensor, expert)) is not None]
        if not cosines:
            continue
        if all(_equal(tensor, expert) for tensor in samples) and all(
            _equal(tensor, expert) for tensor in plan.tensors if expert in tensor.experts
        ):
            yield Finding(
                level="error",
                what=f"{expert} equals the base in every tensor, so it adds nothing",
                remedy="Check its path: it may be the base itself.",
            )
            continue
        if (rounded := _rounded_only(plan, expert, samples)) is not None:
            storage, which = rounded
            yield Finding(
                level="error",
                what=(f"{expert} is the base" if which == "expert" else f"the base is {expert}")
                + f", once stored as {storage}: their difference is the rounding of that format in every tensor, so "
                "the expert adds nothing",
                remedy="Check its path: it may be a converted copy of the base, or what the base was converted from.",
            )
            continue
        cosine = sum(cosines) / len(cosines)
        if cosine < _DISTANT and any(_is_another_layer(tensor, expert) for tensor in samples):
            yield Finding(
                level="warning",
                what=f"{expert} has other layers than the base in slices of the recipe, and they are far from each "
                f"other: the mean cosine of their matrices is {cosine:.2f}",
                remedy="An update is the difference from the same layer of the base: give both the same layer_range.",
            )
        elif cosine < _DISTANT:
            yield Finding(
                level="error" if cosine < _UNRELATED else "warning",
                what=f"{expert} is {'no fine-tune of the base' if cosine < _UNRELATED else 'far from the base'}: the "
                f"mean cosine of their matrices is {cosine:.2f}, and 1 would be equal directions",
                remedy="Merge fine-tunes of one base model, and name that one as base_model.",
            )


def _is_another_layer(tensor: PlannedTensor, expert: ModelReference) -> bool:
    return tensor.base is not None and tensor.input_name(expert) != tensor.input_name(tensor.base)


def _samples(plan: Plan, expert: ModelReference) -> Sequence[PlannedTensor]:
    matrices = []
    for tensor in plan.tensors:
        if tensor.base is None or expert not in tensor.experts or tensor.vocabulary_axis is not None:
            continue
        ours, theirs = tensor.header(tensor.base), tensor.header(expert)
        if ours is not None and theirs is not None and len(ours.shape) == 2 and ours.shape == theirs.shape:
            matrices.append(tensor)
    step = max(1, len(matrices) // _SAMPLES)
    return matrices[::step][:_SAMPLES]


def _pair(tensor: PlannedTensor, expert: ModelReference) -> tuple[torch.Tensor, torch.Tensor] | None:
    try:
        base, other = tensor.read(tensor.base) if tensor.base else None, tensor.read(expert)
    except READING:  # what cannot be read is found by the checks of files and tensors
        return None
    return None if base is None or other is None or base.shape != other.shape else (base, other)


def _cosine(tensor: PlannedTensor, expert: ModelReference) -> float | None:
    pair = _pair(tensor, expert)
    if pair is None:
        return None
    base, other = (side.to(torch.float32).flatten() for side in pair)
    return float(torch.nn.functional.cosine_similarity(base, other, dim=0))


def _rounded_only(
    plan: Plan, expert: ModelReference, samples: Sequence[PlannedTensor]
) -> tuple[str, Literal["base", "expert"]] | None:
    """The 16-bit format whose rounding is all that the expert differs by, and which of them was rounded to it.

    None where it learned something.
    """
    formats = {_rounding(tensor, expert) for tensor in samples}
    if None in formats or not formats:
        return None
    # Vectors and tables may have been trained alone: all that differs is compared; equal entries hold no information.
    for tensor in plan.tensors:
        if expert in tensor.experts and not _equal(tensor, expert) and _rounding(tensor, expert) is None:
            return None
    storage, which = next(found for found in formats if found is not None)
    return str(storage).removeprefix("torch."), which


def _rounding(tensor: PlannedTensor, expert: ModelReference) -> tuple[torch.dtype, Literal["base", "expert"]] | None:
    pair = _pair(tensor, expert)
    if pair is None or not all(side.is_floating_point() for side in pair):
        return None
    base, other = (side.float() for side in pair)
    ours, theirs = storage_formats([base, other], first_look([base, other]).tolist())
    ((floor, storage),) = storage_floors(base, ours, [theirs])
    energy = float((other.double() - base.double()).square().sum())
    if storage is not None and 0 < energy <= floor:
        return storage, "expert"
    (of_the_base,) = roundings_of_the_base(base, ours, [other], [theirs], [energy])
    return None if of_the_base is None else (of_the_base, "base")


def _equal(tensor: PlannedTensor, expert: ModelReference) -> bool:
    pair = _pair(tensor, expert)
    return pair is None or torch.equal(*pair)
