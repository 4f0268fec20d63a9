"""A base and its experts, written to disk and kept in memory for the reference."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.checkpoints.experts import Update, expert_parameters, updates_for
from tests.checkpoints.families import FAMILIES
from tests.checkpoints.family import Family
from tests.checkpoints.storage import Storage, read_tensors, save_model


@dataclass(frozen=True)
class Checkpoint:
    """One model on disk. `tensors` knows each tensor by its name on disk and by its name in the loaded model."""

    path: Path
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Suite:
    """A base, its experts, and what they did to each parameter of the model."""

    family: Family
    base: Checkpoint
    experts: Sequence[Checkpoint]
    updates: Mapping[str, Update]


def make_suite(
    family: Family | str,
    folder: Path,
    *,
    experts: int = 3,
    dtype: torch.dtype = torch.float32,
    expert_dtypes: Sequence[torch.dtype] | None = None,
    storage: Storage = "safetensors",
    update: Update | None = None,
    scale: float = 1.0,
    seed: int = 0,
) -> Suite:
    """Write `folder/base` and `folder/expert0` ... and return them.

    Args:
        family: which architecture.
        folder: where to write.
        experts: how many.
        dtype: of the base, and of the experts unless `expert_dtypes` says otherwise.
        expert_dtypes: one for each expert.
        storage: how the files are laid out.
        update: what the experts do to every tensor; every kind of update in turn when None.
        scale: multiplies every task vector.
        seed: of the weights and of the updates.
    """
    family = FAMILIES[family] if isinstance(family, str) else family
    torch.manual_seed(seed)
    base = family.build().eval().to(dtype)
    parameters = dict(base.named_parameters())
    updates = updates_for(list(parameters)) if update is None else dict.fromkeys(parameters, update)
    with torch.no_grad():
        changed = expert_parameters(parameters, updates, experts, seed + 1, scale)
        models = [_with_parameters(base, values) for values in changed]
    for model, expert_dtype in zip(models, expert_dtypes or [dtype] * experts, strict=True):
        model.to(expert_dtype)
    return Suite(
        family=family,
        base=_write(base, folder / "base", storage),
        experts=[_write(model, folder / f"expert{t}", storage) for t, model in enumerate(models)],
        updates=updates,
    )


def _with_parameters(model: PreTrainedModel, values: Mapping[str, Tensor]) -> PreTrainedModel:
    expert = copy.deepcopy(model)
    for name, parameter in expert.named_parameters():
        parameter.copy_(values[name])
    return expert


def _write(model: PreTrainedModel, path: Path, storage: Storage) -> Checkpoint:
    save_model(model, path, storage)
    in_memory = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return Checkpoint(path, {**in_memory, **read_tensors(path)})
