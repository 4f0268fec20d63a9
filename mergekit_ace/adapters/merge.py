"""The merge of adapters, one weight at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mergekit_ace.adapters.core_space import CoreSpace, core_space, output_space, task_vectors_of
from mergekit_ace.adapters.model import Factors, Place
from mergekit_ace.adapters.request import Request
from mergekit_ace.adapters.tensors import AdapterError
from mergekit_ace.adapters.truncation import Rank, Truncation, input_weight, outputs_kept
from mergekit_ace.linalg.precision import squared_norm
from mergekit_ace.matrix.expert import Expert
from mergekit_ace.methods.advice import log_messages
from mergekit_ace.methods.measured_moments import measured_moments_of_adapters
from mergekit_ace.methods.warnings import MergeWarnings
from mergekit_ace.printable import printable


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
class _Changed:
    """An adapter's update of one matrix."""

    adapter: str
    weight: float
    factors: Factors


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One matrix of a weight, merged."""

    factors: Factors | None
    energy: float = 0.0
    energy_lost: float = 0.0
    outputs_kept: tuple[float, ...] = ()
    note: str = ""


class AdapterMerge:
    """Merges the weights of a request, one after the other; nothing of a weight is kept once it is merged."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._warnings = MergeWarnings()

    @torch.no_grad()
    def weights(self) -> Iterator[MergedWeight]:
        """Every weight that an adapter updates.

        Raises:
            AdapterError: the method cannot be run on factors, or an adapter holds NaN or infinity.
            FactorizationError: a system that no jitter makes positive definite.
        """
        for name, place in self._request.places.items():
            yield self._weight(printable(name), place, self._request.parameters(name))

    def _weight(self, name: str, place: Place, parameters: Mapping[str, Any]) -> MergedWeight:
        method = self._request.method
        # kohya's names are one word, in which a table cannot be told from a layer beside one; it adapts no tables.
        named = "" if self._request.adapters[0].layout == "kohya" else place.weight
        treated = method.treat(named, place.stored_shape, 0 if place.kind == "embedding" else None, parameters)
        changed = self._read(place, name, parameters["weight"])
        report = WeightReport(
            name=name,
            shape=place.shape,
            treatment=treated.reason,
            adapters=tuple(each.adapter for each in changed),
            ranks=tuple(each.factors.rank for each in changed),
        )
        if treated.kind in ("base", "buffer") or not changed:
            return MergedWeight(place=place, factors=None, report=report)
        parts = []
        for matrix_name, updates in _matrices(name, place, changed):
            if treated.kind == "average":
                parts.append(self._average(matrix_name, updates, parameters))
            else:
                if reason := method.needs_entries(parameters):
                    raise AdapterError(f"{name}: {reason}")
                turned = place.transposed != (parameters["input_axis"] == "first")
                parts.append(self._merge(matrix_name, place, updates, parameters, turned=turned))
        return _joined(place, parts, report, self._request.rank)

    def _read(self, place: Place, name: str, weights: Sequence[float]) -> list[_Changed]:
        changed = []
        for adapter, weight in zip(self._request.adapters, weights, strict=True):
            update = adapter.updates.get(place.weight)
            if update is None or weight == 0:
                continue
            factors = update.read()
            if not (bool(torch.isfinite(factors.left).all()) and bool(torch.isfinite(factors.right).all())):
                raise AdapterError(
                    f"{name}: every factor must be finite; adapter {adapter.name} holds NaN or infinity. "
                    "Repair or replace it; nothing was merged from it"
                )
            changed.append(_Changed(adapter=adapter.name, weight=weight, factors=factors))
        return changed

    def _average(self, name: str, updates: Sequence[_Changed], parameters: Mapping[str, Any]) -> _Part:
        """`scale * sum_t w_t D_t / sum_t w_t`, over all adapters: those without the module did not change it."""
        total = sum(weight for weight in parameters["weight"] if weight > 0)
        space = core_space([each.factors for each in updates])
        core = torch.zeros_like(space.cores[0])
        for each, own in zip(updates, space.cores, strict=True):
            core.add_(own, alpha=self._request.method.scale(parameters) * each.weight / total)
        return self._finished(space, core)

    def _merge(
        self, name: str, place: Place, updates: Sequence[_Changed], parameters: Mapping[str, Any], *, turned: bool
    ) -> _Part:
        """One matrix by the method."""
        method = self._request.method
        factors = [_turn(each.factors) if turned else each.factors for each in updates]
        measured = measured_moments_of_adapters(
            name, place.stored_shape, [each.adapter for each in updates], parameters, self._warnings.warn
        )
        space = core_space(factors) if measured is None else output_space(factors)
        experts = [
            Expert(name=each.adapter, tensor=core, weight=each.weight, measured=measured[t] if measured else None)
            for t, (each, core) in enumerate(zip(updates, space.cores, strict=True))
        ]
        task_vectors = task_vectors_of(space, experts, name=name)
        scale = method.scale(parameters)
        if len(task_vectors) == 0:
            return _Part(factors=None, note="no adapter changed it")
        if len(task_vectors) == 1:
            sole = next(each for each in updates if each.adapter == task_vectors.experts[0].name)
            core, note = task_vectors.task_vector(0).mul_(scale), f"only {task_vectors.experts[0].name} changed it"
        else:
            layer = method.merge_matrix(task_vectors, parameters)
            for cause, message in log_messages(method.evidence(task_vectors, layer, parameters)):
                self._warnings.warn(cause, message)
            core, note = layer.task_vector.mul_(scale), layer.describe()
        weights = [each.weight for each in updates]
        part = self._finished(space, core, weights=weights, note=note, turned=turned)
        if len(task_vectors) == 1 and self._request.rank is None:
            own = Factors(left=sole.factors.left * scale, right=sole.factors.right)
            return replace(part, factors=own)
        return part

    def _finished(
        self,
        space: CoreSpace,
        core: Tensor,
        *,
        weights: Sequence[float] | None = None,
        note: str = "",
        turned: bool = False,
    ) -> _Part:
        """Cut to the rank that is asked for, by what the experts' own inputs see where these are known (`weights`)."""
        rank, held = self._request.rank, core
        if rank is not None:
            cut = Truncation(core, None if weights is None else input_weight(space.cores, weights))
            rank = cut.rank_to_keep() if rank == "auto" else rank
            held = cut.of_rank(rank)
        factors = space.factors(held, rank)
        return _Part(
            factors=_turn(factors) if turned else factors,
            energy=squared_norm(core),
            energy_lost=squared_norm(core - held),
            outputs_kept=tuple(outputs_kept(held, space.cores)),
            note=note,
        )


def _matrices(name: str, place: Place, changed: Sequence[_Changed]) -> Iterator[tuple[str, list[_Changed]]]:
    """The matrices of a weight, each with its updates: one, or one for each stacked expert."""
    if place.kind != "stack":
        yield name, list(changed)
        return
    for index in range(place.shape[0]):
        yield (
            f"{name}[{index}]",
            [
                replace(each, factors=Factors(left=each.factors.left[index], right=each.factors.right[index]))
                for each in changed
            ],
        )


def _turn(factors: Factors) -> Factors:
    """The factors of the transposed update."""
    return Factors(left=factors.right.mT, right=factors.left.mT)


def _joined(place: Place, parts: Sequence[_Part], report: WeightReport, wanted: Rank) -> MergedWeight:
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


def _mean_over_matrices(parts: Sequence[_Part]) -> tuple[float, ...]:
    rows = [part.outputs_kept for part in parts if part.outputs_kept]
    return tuple(sum(column) / len(rows) for column in zip(*rows, strict=True)) if rows else ()
