"""One weight of a merged adapter, put together of its matrices, and what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mergekit_ace.adapters.truncation import Rank
from mergekit_ace.factors.model import Place
from mergekit_ace.linalg.factors import Factors


@dataclass(frozen=True, kw_only=True)
class WeightReport:
    """What became of one weight.

    Attributes:
        name: of the weight.
        shape: of the update, outputs first.
        treatment: why it was merged as it was.
        adapters: those that changed it.
        ranks: of their updates, in the same order.
        rank: of the merged update; 0 where the base's weight is kept.
        energy_kept: share of the merged update's energy that the given rank holds.
        outputs_kept: of each of the adapters, how much of its own output on its own inputs the result keeps.
        norm: of the merged update.
        note: what the method found.
    """

    name: str
    shape: tuple[int, ...]
    treatment: str
    adapters: tuple[str, ...]
    ranks: tuple[int, ...]
    rank: int = 0
    energy_kept: float = 1.0
    outputs_kept: tuple[float, ...] = ()
    norm: float = 0.0
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class MergedWeight:
    """The merged update of one weight; no factors where the base's weight is kept."""

    place: Place
    factors: Factors | None
    report: WeightReport


@dataclass(frozen=True, kw_only=True)
class MergedMatrix:
    """One matrix of a weight, merged."""

    factors: Factors | None
    energy: float = 0.0
    energy_lost: float = 0.0
    outputs_kept: tuple[float, ...] = ()
    note: str = ""


def joined(place: Place, parts: Sequence[MergedMatrix], report: WeightReport, wanted: Rank) -> MergedWeight:
    """The matrices of a weight together.

    Stacked experts share one rank, filled up with zeros: that of the adapters together, because peft's patterns cannot
    tell two stacks of one module apart.
    """
    rank = max((part.factors.rank for part in parts if part.factors is not None), default=0)
    if rank and place.kind == "stack":
        rank = sum(report.ranks) if not isinstance(wanted, int) else min(wanted, sum(report.ranks))
    energy = sum(part.energy for part in parts)
    report = replace(
        report,
        rank=rank,
        norm=energy**0.5,
        energy_kept=1 - sum(part.energy_lost for part in parts) / energy if energy > 0 else 1.0,
        outputs_kept=_mean_over_matrices(parts),
        note=parts[0].note if len(parts) == 1 else "",
    )
    if rank == 0:
        return MergedWeight(place=place, factors=None, report=report)
    if place.kind != "stack":
        return MergedWeight(place=place, factors=parts[0].factors, report=report)
    like = next(part.factors for part in parts if part.factors is not None)
    left = like.left.new_zeros((len(parts), like.left.shape[0], rank))
    right = like.right.new_zeros((len(parts), rank, like.right.shape[1]))
    for index, part in enumerate(parts):
        if part.factors is not None:
            left[index, :, : part.factors.rank] = part.factors.left
            right[index, : part.factors.rank] = part.factors.right
    return MergedWeight(place=place, factors=Factors(left=left, right=right), report=report)


def _mean_over_matrices(parts: Sequence[MergedMatrix]) -> tuple[float, ...]:
    rows = [part.outputs_kept for part in parts if part.outputs_kept]
    return tuple(sum(column) / len(rows) for column in zip(*rows, strict=True)) if rows else ()
