"""Whether prompts are of their expert's task, by how its update responds to them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from mergekit.common import ModelReference
from torch import Tensor

from mergekit_ace.adapters.opening import open_adapter
from mergekit_ace.adapters.tensors import AdapterError
from mergekit_ace.moments.load import MomentsFolder
from mergekit_ace.recipe.plan import Plan, PlannedTensor

# Single matrices vary; over so many, each expert of ten real ones responded most to its own prompts.
_MATRICES = 24

Updates = Callable[[PlannedTensor], Tensor | None]


def misplaced_prompts(plan: Plan, folder: MomentsFolder, experts: Mapping[str, ModelReference]) -> dict[str, str]:
    """Experts whose updates respond more to the prompts of another expert than to their own, and that other's name.

    An expert has learned to respond to inputs of its task, so that of all prompts its own should move its outputs most.
    Compared is the mean over matrices, spread over the depth, of

        log (tr(D_t C_s D_t^T) / tr C_s)

    for the update `D_t` of each expert and the moments `C_s` of each expert's prompts.

    Args:
        plan: of the recipe, its adapters unmerged.
        folder: what was measured.
        experts: by the name that they have in the folder; two or more, else there is nothing to compare.
    """
    measured = [tensor for tensor in plan.tensors if tensor.name in folder.index.tensors]
    sampled = measured[:: max(1, len(measured) // _MATRICES)]
    updates = {name: _updates(plan, expert) for name, expert in experts.items()}
    totals = {name: dict.fromkeys(experts, 0.0) for name in experts}
    for tensor in sampled:
        entry = folder.index.tensors[tensor.name]
        moments = {name: folder.measured(entry, name) for name in experts}
        factors = {name: moment.factor.float() for name, moment in moments.items() if moment is not None}
        if len(factors) < len(experts):
            continue
        for name, update_of in updates.items():
            update = update_of(tensor)
            if update is None or not bool(update.any()):
                continue
            update = update if entry.input_first else update.mT
            for other, factor in factors.items():
                response = torch.linalg.vector_norm(factor @ update) / torch.linalg.vector_norm(factor)
                totals[name][other] += math.log(max(float(response), torch.finfo(torch.float32).tiny))
    return {
        name: most
        for name, responses in totals.items()
        if responses[most := max(responses, key=lambda other: responses[other])] > responses[name]
    }


def _updates(plan: Plan, expert: ModelReference) -> Updates:
    """From a tensor to the expert's update of it, as stored; None where it has none, or none that can be read here."""
    if expert.lora is None:
        return lambda tensor: _difference(tensor, expert)
    try:
        adapter = open_adapter(Path(expert.lora.path), base=Path(expert.model.path))
    except AdapterError:
        return lambda tensor: None  # not on this disk

    def product(tensor: PlannedTensor) -> Tensor | None:
        update = adapter.updates.get(tensor.input_name(expert))
        if update is None or update.place.kind != "linear":
            return None
        factors = update.read()
        whole = (factors.left @ factors.right).float()
        return whole.mT if update.place.transposed else whole

    return product


def _difference(tensor: PlannedTensor, expert: ModelReference) -> Tensor | None:
    if tensor.base is None or not tensor.reads(expert):
        return None
    ours, theirs = tensor.read(tensor.base), tensor.read(expert)
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return None
    return theirs.float() - ours.float()


def described(misplaced: Mapping[str, str]) -> Sequence[str]:
    """What a person should look at, one line for each expert."""
    return [
        f"{name} responds more to the prompts of {other} than to its own; check that they are of its task. Prompts of "
        "another task cost more than prompts gain"
        for name, other in misplaced.items()
    ]
