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
# Energy of a difference, in that of rounding, between which it may be rounding: uniform errors of a few hundred values
# are within a tenth. A small update has much less, as a base that was trained further from its stored values leaves it.
_ROUNDED = (0.8, 1.25)
# How many values the statistics of rounding are taken from, and the share of them (and the least number) with the
# finest steps, which give the size of the update.
_SAMPLE = 1 << 16
_FINEST, _FEWEST = 0.05, 256
# The bits of a float32's exponent.
_EXPONENT = 0x7F800000
# Steps of at least half a deviation, so many to each side: beyond ten deviations the density is 0.
_JUMPS = 20


Formats = tuple[torch.dtype, ...]
"""The 16-bit formats that hold every value of a tensor exactly, of `COARSE_FORMATS` and in their order."""


def largest_of_noise(norm: float, shape: tuple[int, int]) -> float:
    """Above the largest singular value of `[m, n]` independent errors: `norm / sqrt(m n) (sqrt(m) + sqrt(n))`.

    Source: the edge of the Marchenko-Pastur law.

    Args:
        norm: `||.||_F` of the errors.
        shape: `(m, n)`.
    """
    m, n = shape
    return norm / math.sqrt(m * n) * (math.sqrt(m) + math.sqrt(n))


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


def roundings_of_the_base(
    base: Tensor,
    base_formats: Formats,
    experts: Sequence[Tensor],
    formats: Sequence[Formats],
    energies: Sequence[float],
) -> list[torch.dtype | None]:
    """The format whose rounding made the base out of each expert; None where that is not all that they differ by.

    The base was stored in a coarser format than the model that it was rounded from, and an expert is that model,
    unchanged. Then every entry of `expert - base` is within half a step of the format, and half a step of the expert's
    own where that was rounded too, and their energy is that of uniform errors, the sum of `ulp^2 / 12`, within
    `_ROUNDED`. An update does not look so: its entries are not larger where the weights are, so that it leaves these
    bounds or has much less energy.

    Args:
        base: any shape.
        base_formats: of the base.
        experts: of the base's shape, dtype and device.
        formats: of each expert.
        energies: `||expert - base||_F^2` of each.
    """
    finer = [bool(base_formats) and base_formats[0] not in known for known in formats]
    if base.dtype in COARSE_FORMATS or not any(finer):
        return [None] * len(experts)
    storage = base_formats[0]
    expected = float(rounding_energy(base, storage))
    likely = [
        fine and _ROUNDED[0] * expected <= energy <= _ROUNDED[1] * expected
        for fine, energy in zip(finer, energies, strict=True)
    ]
    return [
        storage if seems and _is_rounding(base, expert, (storage, *known[:1])) else None
        for seems, expert, known in zip(likely, experts, formats, strict=True)
    ]


def _is_rounding(base: Tensor, expert: Tensor, steps_of: Formats) -> bool:
    """Whether two tensors are nowhere further apart than half a step of all of these formats together."""
    within = []
    for ours, theirs in zip(blocks(base), blocks(expert), strict=True):
        steps = torch.stack([_steps(ours, storage).double() for storage in steps_of]).sum(dim=0)
        within.append(((theirs.double() - ours.double()).abs() <= steps / 2).all())
    return bool(torch.stack(within).all())


def expected_rounding_energies(
    base: Tensor, experts: Sequence[Tensor], formats: Sequence[Formats], energies: Sequence[float]
) -> list[float]:
    """Energy of each `D = expert - base` that is expected to be the rounding of the expert's format; 0 in float32.

        sum of ulp(x)^2 / 12            where the base was not rounded in the same way
        (1 - c^2 sigma^2 / s) ||D||^2   where it was, with s the mean square of D

    In the second case `D` is the update rounded to multiples of the step between neighboring numbers, which a small
    update seldom reaches: what is left of it is `c` times the update, and an error that prefers no direction. For a
    normal update of deviation `sigma` and a step `u`, by Stein's lemma,

        c = E[D delta] / sigma^2 = (u / sigma) sum_j phi((j + 1/2) u / sigma)

    `sigma` is found from the values near zero, whose steps are the finest.

    Args:
        base: any shape.
        experts: of the base's shape, dtype and device.
        formats: of each expert.
        energies: `||D||_F^2` of each.
    """
    if not any(formats):  # nothing to wait for
        return [0.0] * len(experts)
    same = {known[0]: _round_trips(base, known[0]) for known in formats if known and known[0] != base.dtype}
    shares = []
    for expert, known, energy in zip(experts, formats, energies, strict=True):
        if not known or energy <= 0:
            shares.append(torch.zeros((), dtype=torch.float64, device=base.device))
            continue
        share = _lost_share(base, expert, known[0])
        if known[0] in same:
            share = torch.where(same[known[0]], share, _rounded_energy(expert, known[0]) / energy)
        shares.append(share)
    found: list[float] = torch.stack(shares).clamp(max=1).tolist()
    return [share * energy for share, energy in zip(found, energies, strict=True)]


def rounding_energy(values: Tensor, storage: torch.dtype) -> Tensor:
    """Expected `||storage(X) - X||_F^2` of numbers of the size of `values`, float64; from a sample."""
    stride = max(1, values.numel() // _SAMPLE)
    sample = values.flatten()[::stride]
    return _rounded_energy(sample, storage) * (values.numel() / max(1, sample.numel()))


def _rounded_energy(values: Tensor, storage: torch.dtype) -> Tensor:
    """Expected squared error of rounding to a format: a twelfth of every squared step."""
    total = torch.zeros((), dtype=torch.float64, device=values.device)
    for block in blocks(values):
        total += _steps(block, storage).double().square().sum()
    return total / 12


def _steps(values: Tensor, storage: torch.dtype) -> Tensor:
    """The distance between neighboring numbers of a format at each value, float32."""
    information = torch.finfo(storage)
    # ulp(x) = eps 2^floor(log2 |x|): float32 without its sign and its significand
    powers = (values.float().view(torch.int32) & _EXPONENT).view(torch.float32)
    return (powers * information.eps).clamp_(min=information.smallest_normal * information.eps)


def _lost_share(base: Tensor, expert: Tensor, storage: torch.dtype) -> Tensor:
    """Share of `||expert - base||^2` that is rounding, where both are on the grid of one format; from a sample."""
    stride = max(1, base.numel() // _SAMPLE)
    before = base.flatten()[::stride]
    squares = (expert.flatten()[::stride].double() - before.double()).square()
    # Padding is no weight: it is sorted behind all others and counted nowhere.
    steps, order = torch.where(before == 0, math.inf, _steps(before, storage).double()).sort()
    present = steps.isfinite()
    steps, squares = torch.where(present, steps, 0.0), torch.where(present, squares[order], 0.0)
    count = present.sum()
    finest = present & (torch.arange(len(steps), device=base.device) < (_FINEST * count).clamp(min=_FEWEST))
    among = finest.sum().clamp(min=1)
    variance = ((squares - steps.square() / 12) * finest).sum() / among
    mean_square = squares.sum() / count.clamp(min=1)
    usable = (variance > 0) & (mean_square > 0)
    # Below half a deviation a step changes nothing: c = 1 to within 1e-15.
    ratios = (steps / torch.where(usable, variance, 1.0).sqrt()).clamp(min=0.5)
    kept = torch.zeros_like(steps)
    for jump in range(_JUMPS):
        kept += 2 * torch.exp(-0.5 * ((jump + 0.5) * ratios).square())
    kept = (ratios * kept * present).sum() / count.clamp(min=1) / math.sqrt(2 * math.pi)
    share = 1 - kept.square() * variance / torch.where(usable, mean_square, 1.0)
    return torch.where(usable, share.clamp(min=0.0), 0.0)


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
