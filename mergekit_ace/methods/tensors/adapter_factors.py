"""The factors of experts that mergekit hands over as `base+adapter`, read from the adapters' own files.

A merged expert is rounded to the format that it was stored in, and its rank has to be found. The adapter's file has
both exactly. Its update is taken from there where it is what the tensor shows; where the tensor was changed on the way
(slices, tokenizers, another base), the tensor counts.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from mergekit.common import ModelReference
from mergekit.merge_methods.base import TensorGroup
from torch import Tensor

from mergekit_ace.factors.model import Adapter
from mergekit_ace.factors.opening import CONFIGURATION, open_adapter
from mergekit_ace.factors.tensors import AdapterError
from mergekit_ace.linalg.blocks import blocks
from mergekit_ace.linalg.factors import Factors
from mergekit_ace.linalg.precision import working_dtype

LOG = logging.getLogger("mergekit_ace")

# peft rounds the update to the base's format before it adds it.
_ROUNDED_UPDATE = 1e-4
# The update must explain most of the difference, or it cannot be told from another one below the rounding.
_EXPLAINED = 0.5


def adapter_factors(group: TensorGroup) -> list[Factors | None]:
    """The factors of each model but the base, as the tensor is stored; None where they are not known.

    An adapter that leaves the tensor alone has factors of rank 0.

    Args:
        group: of one tensor; its models are mergekit's references where it comes from a recipe.
    """
    base = group.base
    if base is None or not isinstance(base.id, ModelReference) or base.tensor.ndim != 2:
        return [None] * len(group.non_base)
    name = group.metadata.name or ""
    return [
        _factors(entry.id, base.id, name, base.tensor, entry.tensor) if isinstance(entry.id, ModelReference) else None
        for entry in group.non_base
    ]


def _factors(expert: ModelReference, base: ModelReference, name: str, stored: Tensor, tensor: Tensor) -> Factors | None:
    if expert.lora is None or expert.model != base.model or base.lora is not None:
        return None
    file = Path(expert.lora.path, CONFIGURATION)
    if not file.is_file():  # of a hub, or no adapter of peft
        return None
    adapter = _opened(expert.lora.path, base.model.path, file.stat().st_mtime_ns)
    if adapter is None:
        return None
    update = adapter.updates.get(name)
    if update is None:
        empty = Factors(left=stored.new_zeros(stored.shape[0], 0), right=stored.new_zeros(0, stored.shape[1]))
        if not torch.equal(stored, tensor):
            return _not_the_tensors(expert, name)
        return empty
    if update.place.stored_shape != tuple(stored.shape):
        return _not_the_tensors(expert, name)
    factors = update.read()
    if update.place.transposed:
        factors = factors.transposed
    dtype = working_dtype(stored.dtype)
    factors = Factors(left=factors.left.to(stored.device, dtype), right=factors.right.to(stored.device, dtype))
    return factors if _is_update(factors, stored, tensor) else _not_the_tensors(expert, name)


def _not_the_tensors(expert: ModelReference, name: str) -> Factors | None:
    """None; the log names the tensor and the expert."""
    LOG.info("%s: the update of %s is taken from the tensor; it is not what the adapter's file holds", name, expert)
    return None


@lru_cache(maxsize=64)
def _opened(path: str, base: str, changed: int) -> Adapter | None:
    """The adapter in a folder, once for each state of it; None where its update is no factors."""
    try:
        return open_adapter(Path(path), base=Path(base))
    except (AdapterError, OSError) as error:
        LOG.info("The adapter %s is merged as mergekit hands it over: %s", path, error)
        return None


def _is_update(factors: Factors, base: Tensor, tensor: Tensor) -> bool:
    """Whether `tensor = base + left @ right`, to the rounding of the formats that they are stored in."""
    eps = max(_eps(base), _eps(tensor)) / 2
    missed = shown = size = whole = 0.0
    start = 0
    for ours, theirs in zip(blocks(base), blocks(tensor), strict=True):
        update = factors.left[start : start + len(ours)] @ factors.right
        start += len(ours)
        difference = theirs.to(update.dtype) - ours
        squares = torch.stack([(difference - update).square().sum(), difference.square().sum(), update.square().sum()])
        missed, shown, size = (a + b for a, b in zip((missed, shown, size), squares.tolist(), strict=True))
        whole += float(theirs.to(update.dtype).square().sum())
    return missed <= eps**2 * whole + _ROUNDED_UPDATE * size and missed <= _EXPLAINED * shown


def _eps(tensor: Tensor) -> float:
    """Of the coarsest format that holds the tensor as it is."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
            return torch.finfo(dtype).eps
    return torch.finfo(tensor.dtype).eps


def known(factors: Sequence[Factors | None]) -> list[Factors]:
    """All of them, if all are known and not all are empty; none otherwise."""
    found = [each for each in factors if each is not None]
    return found if len(found) == len(factors) and any(each.rank for each in found) else []
