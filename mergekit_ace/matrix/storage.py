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


Formats = tuple[torch.dtype, ...]
"""The 16-bit formats that hold every value of a tensor exactly, of `COARSE_FORMATS` and in their order."""


def first_look(tensors: Sequence[Tensor]) -> Tensor:
    """Whether the first few values of each tensor are exact in each of `COARSE_FORMATS`, `[tensors, formats]` bool."""
    looks = [_first_values(tensor) for tensor in tensors]
    return torch.stack([_round_trips(look, storage) for look in looks for storage in COARSE_FORMATS]).view(
        len(looks), len(COARSE_FORMATS)
    )


def storage_formats(tensors: Sequence[Tensor], passed: Sequence[Sequence[float]]) -> list[Formats]:
    """The 16-bit formats that hold all values of each tensor exactly; of a bfloat16 tensor its own, the coarsest.

    Args:
        tensors: any shapes and floating-point dtypes, on one device; NaN is not representable.
        passed: `first_look`, on the host. What passed it is read whole.
    """
    candidates = [
        (place, storage)
        for place, row in enumerate(passed)
        for storage, seems_exact in zip(COARSE_FORMATS, row, strict=True)
        if seems_exact and (tensors[place].dtype != COARSE_FORMATS[0] or storage == COARSE_FORMATS[0])
    ]
    unknown = [(place, storage) for place, storage in candidates if tensors[place].dtype != storage]
    flags = (
        torch.stack([_round_trips(tensors[place], storage) for place, storage in unknown]).tolist() if unknown else []
    )
    wrong = {pair for pair, exact in zip(unknown, flags, strict=True) if not exact}
    return [
        tuple(storage for place, storage in candidates if place == number and (place, storage) not in wrong)
        for number in range(len(tensors))
    ]


def storage_floors(
    base: Tensor, base_formats: Formats, experts: Sequence[Formats]
) -> list[tuple[float, torch.dtype | None]]:
    """The energy up to which each `expert - base` is the rounding of the expert's coarser format, and that format.

        1.1 * ||storage(base) - base||_F^2

    0 and None where the expert was not rounded to `bfloat16` or `float16`, or the base was rounded in the same way, or
    has a dtype of 16 bits: a common one is one that no tensor was promoted to, so all were stored in it.

    Args:
        base: any shape.
        base_formats: of the base.
        experts: of each expert.
    """
    if base.dtype in COARSE_FORMATS:
        return [(0.0, None)] * len(experts)
    coarser = [
        storage for storage in COARSE_FORMATS if storage not in base_formats and any(storage in e for e in experts)
    ]
    energies = {storage: _TWICE_ROUNDED * _rounding_energy(base, storage) for storage in coarser}
    floors: list[tuple[float, torch.dtype | None]] = []
    for formats in experts:
        known = [(energies[storage], storage) for storage in formats if math.isfinite(energies.get(storage, math.inf))]
        floors.append(max(known, key=lambda pair: pair[0], default=(0.0, None)))
    return floors


def expected_rounding_energies(base: Tensor, experts: Sequence[Tensor], formats: Sequence[Formats]) -> list[float]:
    """Energy that rounding each expert to its storage format is expected to add to `expert - base`; 0 in float32.

        sum of ulp(x)^2 / 12 over the values that differ from the base's

    Where both are stored in one format, a value that equals the base's was rounded back to it and adds nothing.

    Args:
        base: any shape.
        experts: of the base's shape, dtype and device.
        formats: of each expert.
    """
    totals = []
    for expert, known in zip(experts, formats, strict=True):
        total = torch.zeros((), dtype=torch.float64, device=base.device)
        if known:
            information = torch.finfo(known[0])
            for ours, theirs in zip(blocks(base), blocks(expert), strict=True):
                # ulp(x) = eps 2^floor(log2 |x|), and frexp gives |x| = f 2^e with f in [1/2, 1)
                exponent = torch.frexp(theirs.float()).exponent - 1
                ulp = torch.ldexp(torch.full_like(exponent, information.eps, dtype=torch.float32), exponent)
                ulp.clamp_(min=information.smallest_normal * information.eps).mul_(theirs != ours)
                total += ulp.double().square().sum()
        totals.append(total)
    if not any(formats):  # nothing to wait for
        return [0.0] * len(totals)
    energies: list[float] = (torch.stack(totals) / 12).tolist()
    return energies


def _first_values(tensor: Tensor) -> Tensor:
    """At most `_FIRST_LOOK` values, without a copy of a tensor that is not contiguous."""
    rows = tensor if tensor.ndim < 2 else tensor[: 1 + _FIRST_LOOK // max(1, tensor[0].numel())]
    return rows.flatten()[:_FIRST_LOOK]


def _round_trips(tensor: Tensor, storage: torch.dtype) -> Tensor:
    same = [(block.to(storage).to(tensor.dtype) == block).all() for block in blocks(tensor)]
    return torch.stack(same).all()


def _rounding_energy(tensor: Tensor, storage: torch.dtype) -> float:
    total = torch.zeros((), dtype=torch.float64, device=tensor.device)
    for block in blocks(tensor):
        total += (block.to(storage).double() - block.double()).square().sum()
    return float(total)
