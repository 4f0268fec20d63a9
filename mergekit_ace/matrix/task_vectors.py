"""The task vectors of one weight matrix: what each expert changed, taken one at a time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_ace.linalg.low_rank import top_energies
from mergekit_ace.linalg.subspace import SingularTriples, singular_triples
from mergekit_ace.linalg.symmetric import add_gram_upper_, mirror_upper_
from mergekit_ace.matrix.coordinates import Coordinates
from mergekit_ace.matrix.expert import Participant

# Of the largest update; leaves half of the range of float32 to its smaller eigenvalues.
_LEAST_ENERGY = 1e-12
# Rows that differ by no more than this share of their energy are equal as far as float32 differences can tell.
_EQUAL_ROWS = 1e-12


@dataclass(frozen=True, kw_only=True)
class UpdateStatistics:
    """What one pass over an expert's task vector `D = 1 mu + C` gives, in float64."""

    energy: float
    """`||D||_F^2`."""
    centered_energy: float
    """`||C||_F^2 = tr C^T C = ||D||_F^2 - m ||mu||^2`; 0 when all rows are equal to within rounding."""


def statistics_of(energy: float, energy_of_means: float) -> UpdateStatistics:
    """Of `||D||_F^2` and `m ||mu||^2`."""
    centered = energy - energy_of_means
    return UpdateStatistics(energy=energy, centered_energy=centered if centered > _EQUAL_ROWS * energy else 0.0)


class TaskVectors(ABC):
    """The experts that carry information in one matrix, and their task vectors `D_t`, `[m, n]`, on demand.

    Attributes:
        name: the tensor's name, for messages.
        depth: how many blocks of the model follow one another; None where it is not known.
        dtype: working dtype, of every task vector.
        device: of every task vector.
        experts: those that carry information, in the order of their task vectors.
        statistics: of their task vectors.
        shares: `a_t`, their weights scaled to a mean of 1.
        left_out: name of every expert that has no part in the merge, and why.
        unit: what the experts' own updates were divided by.
    """

    experts: Sequence[Participant]
    base_norm: float | None
    """`||W_0||_F`; None where it is not known."""
    energy_of_mean: float
    """`||sum_t a_t D_t / T||_F^2`, the squared length of the mean update."""
    coordinates: Coordinates | None = None
    """Of the matrices that the task vectors are the cores of; None: they are these themselves.

    `m` and `n` stay those of the matrices, here and in whatever takes task vectors; tensors are `buffer_shape`."""

    def __init__(
        self,
        given: Sequence[Participant],
        candidates: Sequence[Participant],
        statistics: Sequence[UpdateStatistics],
        reasons: Sequence[str | None],
        *,
        name: str,
        depth: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Keep the candidates that have no reason to be left out.

        Args:
            given: all experts.
            candidates: those of positive weight.
            statistics: of each candidate.
            reasons: why a candidate carries no information; None where it does.
            name: as the attribute.
            depth: as the attribute.
            dtype: as the attribute.
            device: as the attribute.
        """
        self.name, self.depth, self.dtype, self.device, self.unit = name, depth, dtype, device, 1.0
        self.left_out: Mapping[str, str] = {expert.name: "weight 0" for expert in given if expert.weight == 0} | {
            expert.name: reason for expert, reason in zip(candidates, reasons, strict=True) if reason is not None
        }
        informative = [t for t, reason in enumerate(reasons) if reason is None]
        self.experts = tuple(candidates[t] for t in informative)
        self.statistics = tuple(statistics[t] for t in informative)
        weights = math.fsum(expert.weight for expert in self.experts)
        self.shares: tuple[float, ...] = tuple(len(self.experts) * expert.weight / weights for expert in self.experts)

    def __len__(self) -> int:
        """`T`: experts with information."""
        return len(self.experts)

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """`(m, n)`."""

    @property
    @abstractmethod
    def buffer_shape(self) -> tuple[int, int]:
        """Shape of every task vector: `(m, n)`, or that of the cores."""

    @property
    @abstractmethod
    def rounding(self) -> float:
        """Largest singular value that rounding alone gives a task vector."""

    @property
    @abstractmethod
    def output_rounding(self) -> float:
        """`||.||_F` that rounding the merged weights to the base's dtype is expected to add."""

    @abstractmethod
    def rounding_energies(self) -> list[float]:
        """Energy that rounding to the stored format is expected to have added to each `D_t`."""

    @abstractmethod
    def task_vector(self, t: int, *, out: Tensor | None = None) -> Tensor:
        """`D_t`, `buffer_shape`, working dtype, in storage of its own that the caller may overwrite; or in `out`."""

    @abstractmethod
    def rows(self, t: int, rows: slice) -> Tensor:
        """Some rows of `D_t`, as `task_vector`."""

    @abstractmethod
    def apart(self, t: int, reference: int, rows: slice) -> Tensor:
        """Some rows of `D_t - D_r`, with the rounding of one difference."""

    @abstractmethod
    def row_panels(self) -> list[slice]:
        """The rows of `buffer_shape` in pieces for products."""

    @abstractmethod
    def _are_copies(self, s: int, t: int) -> bool:
        """Whether two experts are equal, bit by bit."""

    def _keep(self, experts: Sequence[int]) -> None:
        """Leave out all other experts, in place; shares are the caller's."""
        self.experts = tuple(self.experts[t] for t in experts)
        self.statistics = tuple(self.statistics[t] for t in experts)

    @abstractmethod
    def _divide(self, unit: float) -> None:
        """Divide all tensors by a power of two: replaced by others, in place of this object alone."""

    @property
    def energies(self) -> tuple[float, ...]:
        """`e_t = ||D_t||_F^2`."""
        return tuple(measured.energy for measured in self.statistics)

    @property
    def measured(self) -> int:
        """How many experts have measured second moments."""
        return sum(expert.measured is not None for expert in self.experts)

    @property
    def suitable_unit(self) -> float:
        """1, or a power of two near the longest update where that is far from 1.

        The normal equations have products of three task vectors, which leave the range of float32 where the energies
        are below 1e-25 or above 1e25.
        """
        largest = max(self.energies, default=1.0)
        if _LEAST_ENERGY <= largest <= 1 / _LEAST_ENERGY:
            return 1.0
        return math.ldexp(1.0, round(math.log2(largest) / 2))

    def in_units_of(self, unit: float) -> TaskVectors:
        """The same task vectors divided by `unit`, a power of two: exact, but for numbers below float32's."""
        scaled = copy(self)
        scaled._divide(unit)
        scaled.unit = self.unit * unit
        scaled.statistics = tuple(
            UpdateStatistics(energy=s.energy / unit**2, centered_energy=s.centered_energy / unit**2)
            for s in self.statistics
        )
        scaled.base_norm = None if self.base_norm is None else self.base_norm / unit
        scaled.energy_of_mean = self.energy_of_mean / unit**2
        return scaled

    def zeros(self, *shape: int) -> Tensor:
        """Zeros of a shape, in the working dtype, on the device of the task vectors."""
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def without_copies(self) -> tuple[TaskVectors, tuple[int, ...]]:
        """Every expert once, with the summed weight of its exact copies; and which of them each expert here became."""
        kept: list[int] = []
        became: list[int] = []
        shares: list[float] = []
        for t, share in enumerate(self.shares):
            place = next((p for p, s in enumerate(kept) if self._are_the_same(s, t)), len(kept))
            if place == len(kept):
                kept.append(t)
                shares.append(0.0)
            shares[place] += share
            became.append(place)
        distinct = copy(self)
        distinct._keep(kept)
        distinct.shares = tuple(share * len(kept) / len(self) for share in shares)
        return distinct, tuple(became)

    def _are_the_same(self, s: int, t: int) -> bool:
        # The energies, measured the same way, differ unless the tensors are equal: almost no pair is compared in full.
        equal = self.statistics[s] == self.statistics[t] and self.experts[s].measured is self.experts[t].measured
        return equal and self._are_copies(s, t)

    def with_shares(self, shares: Sequence[float]) -> TaskVectors:
        """The same task vectors with other shares, of mean 1; `energy_of_mean` stays that of the old ones."""
        other = copy(self)
        other.shares = tuple(shares)
        return other

    def gram(self, t: int, *, rough: bool = False) -> Tensor:
        """`D_t^T D_t`, `[n, n]`; where it may be `rough`, by products of rows in bfloat16, which round it to that."""
        product = self.zeros(self.buffer_shape[1], self.buffer_shape[1])
        rounded = product.bfloat16() if rough else None
        for rows in self.row_panels():
            if rounded is None:
                add_gram_upper_(product, self.rows(t, rows))
            else:
                product.add_(add_gram_upper_(rounded, self.rows(t, rows).bfloat16(), keep=0.0))
        return mirror_upper_(product)

    def add_apart_times_(self, target: Tensor, t: int, reference: int, matrix: Tensor) -> Tensor:
        """`target + (D_t - D_r) matrix`, in place and in pieces of rows."""
        for rows in self.row_panels():
            target[rows].addmm_(self.apart(t, reference, rows), matrix)
        return target

    def singular_triples(self, t: int, k: int, *, floor: float = 0.0) -> SingularTriples:
        """The top `k` singular triples of `D_t`, or as many as are no rounding: above `floor` and `rounding`."""
        return singular_triples(self.task_vector(t), k, floor=max(floor, self.rounding))

    def top_energies(self, experts: Sequence[int], directions: int) -> list[float]:
        """`||.||_F^2` of each `D_t` in its top singular directions."""
        return top_energies((self.task_vector(t) for t in experts), directions)

    def sum(self) -> Tensor:
        """`sum_t a_t D_t`, `buffer_shape`, working dtype, with the shares `a_t`."""
        total = self.zeros(*self.buffer_shape)
        for t, share in enumerate(self.shares):
            total.add_(self.task_vector(t), alpha=share)
        return total

    def mean_row(self, rows: Tensor) -> Tensor:
        """The mean of the `m` rows of a task vector, `[n]`."""
        if self.coordinates is None:
            return rows.mean(dim=0)
        return (self.coordinates.ones_left @ rows).div_(self.shape[0])

    def add_to_every_row_(self, rows: Tensor, row: Tensor, *, factor: float = 1.0) -> Tensor:
        """`rows + factor 1_m row`, in place."""
        if self.coordinates is None:
            return rows.add_(row, alpha=factor)
        return rows.addr_(self.coordinates.ones_left, row, alpha=factor)

    def add_mean_(self, target: Tensor, *, factor: float) -> Tensor:
        """`target + factor sum_t a_t D_t / T`, in place and in pieces of rows."""
        for t, share in enumerate(self.shares):
            for rows in self.row_panels():
                target[rows].add_(self.rows(t, rows), alpha=factor * share / len(self))
        return target

    def mean(self) -> Tensor:
        """`sum_t a_t D_t / T`, `buffer_shape`, working dtype."""
        return self.sum().div_(len(self))
