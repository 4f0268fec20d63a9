"""What storing weights in a 16-bit format leaves in a task vector: the rounding of that format."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_ace.linalg.blocks import blocks

COARSE_FORMATS = (torch.bfloat16, torch.float16)
# Values looked at before a whole tensor is: most float32 tensors show within a few that they were never rounded.
_FIRST_LOOK = 4096
# An expert that was rounded twice, to float16 and then to bfloat16, differs by 1.6 percent more energy than one step.
_TWICE_ROUNDED = 1.1


def is_stored_as(tensor: Tensor, storage: torch.dtype) -> bool:
    """Whether every value of `tensor` is exactly representable in `storage`.

    Args:
        tensor: any shape and floating-point dtype; NaN is not representable.
        storage: `bfloat16` or `float16`.
    """
    if tensor.dtype == storage:
        return True
    if tensor.dtype in COARSE_FORMATS:
        return _round_trips(tensor, storage)
    return _round_trips(tensor.flatten()[:_FIRST_LOOK], storage) and _round_trips(tensor, storage)


def storage_floors(base: Tensor, experts: Sequence[Tensor]) -> list[tuple[float, torch.dtype | None]]:
    """`rounding_floor` of every expert; nothing is read twice where the base was rounded itself.

    Args:
        base: any shape.
        experts: of the base's shape, dtype and device.
    """
    if base.dtype in COARSE_FORMATS:
        # A common dtype of 16 bits is one that no tensor was promoted to: all were stored in it.
        return [(0.0, None)] * len(experts)
    return [rounding_floor(base, expert) for expert in experts]


def rounding_floor(base: Tensor, expert: Tensor) -> tuple[float, torch.dtype | None]:
    """The energy up to which `expert - base` is the rounding of the expert's coarser storage format, and that format.

        1.1 * ||storage(base) - base||_F^2

    0 and None where the expert was not rounded to `bfloat16` or `float16`, or the base was rounded in the same way.

    Args:
        base: any shape.
        expert: of the base's shape, dtype and device.
    """
    floor, coarsest = 0.0, None
    for storage in COARSE_FORMATS:
        if base.dtype != storage and is_stored_as(expert, storage) and not is_stored_as(base, storage):
            energy = _TWICE_ROUNDED * _rounding_energy(base, storage)
            if math.isfinite(energy) and energy > floor:
                floor, coarsest = energy, storage
    return floor, coarsest


def expected_rounding_energy(base: Tensor, expert: Tensor) -> float:
    """Energy that rounding the expert to its storage format is expected to add to `expert - base`; 0 in float32.

        sum of ulp(x)^2 / 12 over the values that differ from the base's

    Where both are stored in one format, a value that equals the base's was rounded back to it and adds nothing.

    Args:
        base: any shape.
        expert: of the base's shape, dtype and device.
    """
    storage = next((storage for storage in COARSE_FORMATS if is_stored_as(expert, storage)), None)
    if storage is None:
        return 0.0
    information = torch.finfo(storage)
    total = torch.zeros((), dtype=torch.float64, device=base.device)
    for ours, theirs in zip(blocks(base), blocks(expert), strict=True):
        # ulp(x) = eps 2^floor(log2 |x|), and frexp gives |x| = f 2^e with f in [1/2, 1)
        exponent = torch.frexp(theirs.float()).exponent - 1
        ulp = torch.ldexp(torch.full_like(exponent, information.eps, dtype=torch.float32), exponent)
        ulp.clamp_(min=information.smallest_normal * information.eps).mul_(theirs != ours)
        total += ulp.double().square().sum()
    return float(total) / 12


def _round_trips(tensor: Tensor, storage: torch.dtype) -> bool:
    return all(torch.equal(block.to(storage).to(tensor.dtype), block) for block in blocks(tensor))


def _rounding_energy(tensor: Tensor, storage: torch.dtype) -> float:
    total = torch.zeros((), dtype=torch.float64, device=tensor.device)
    for block in blocks(tensor):
        total += (block.to(storage).double() - block.double()).square().sum()
    return float(total)
