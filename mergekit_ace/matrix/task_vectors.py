"""The task vectors of one weight matrix: what each expert changed, taken one at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mergekit_ace.linalg.blocks import blocks, panels
from mergekit_ace.linalg.precision import require_full_float32, squared_norms, working_dtype
from mergekit_ace.linalg.symmetric import add_gram_upper_, mirror_upper_
from mergekit_ace.matrix.coordinates import Coordinates
from mergekit_ace.matrix.expert import Expert, difference, require_finite_update, voting_experts
from mergekit_ace.matrix.storage_rounding import (
    COARSE_FORMATS,
    Formats,
    expected_rounding_energies,
    first_look,
    rounding_energy,
    roundings_of_the_base,
    storage_floors,
    storage_formats,
)

# Of the largest update; leaves half of the range of float32 to its smaller eigenvalues.
_LEAST_ENERGY = 1e-12


@dataclass(frozen=True, kw_only=True)
class UpdateStatistics:
    """What one pass over an expert's task vector `D = 1 mu + C` gives, in float64."""

    energy: float
    """`||D||_F^2`."""
    centered_energy: float
    """`||C||_F^2 = tr C^T C = ||D||_F^2 - m ||mu||^2`; 0 when all rows are equal to within rounding."""


class TaskVectors:
    """The experts that carry information in one matrix, and their task vectors `D_t = expert - base` on demand.

    Differences are taken in the working dtype: bfloat16 checkpoints differ from their base in the last bits, and a
    difference rounded to bfloat16 would keep 8 bits of an 8-bit number.

    An expert carries information when `||D_t||_F^2` exceeds the energy of rounding: `(eps ||base||_F)^2` with `eps` of
    the working dtype, and `||storage(base) - base||_F^2` where the expert was rounded to a coarser format than the base
    (a bfloat16 copy of a float32 base). Less is what storing the same weights in another format leaves, and trace
    normalization would give it the weight of an update. Nor does the model carry any that the base was rounded from.

    Args:
        base: `[m, n]`.
        experts: of the base's shape, dtype and device. Those of weight 0, and those without information, are left out.
        name: the tensor's name, for messages.
        coordinates: of the matrices that base and experts are the cores of; None: they are these themselves. `m` and
            `n` stay those of the matrices, here and in whatever takes task vectors; tensors are `buffer_shape`.
        depth: how many blocks of the model follow one another; None where it is not known.

    Raises:
        ValueError: when a tensor holds NaN or infinity, a weight is negative or not finite, or no weight is positive.
        RuntimeError: the process runs float32 products in reduced precision, and every method takes products of these.
    """

    def __init__(
        self,
        base: Tensor,
        experts: Sequence[Expert],
        *,
        name: str = "the matrix",
        coordinates: Coordinates | None = None,
        depth: int | None = None,
    ) -> None:
        require_full_float32(base.device)
        self.name = name
        self.depth = depth
        self.base = base
        self.coordinates = coordinates
        self.unit = 1.0
        """What the experts' own updates were divided by."""
        self.dtype = working_dtype(base.dtype)
        candidates = voting_experts(experts, name=name)
        heaviest = max(expert.weight for expert in candidates)
        found = _measure(base, candidates, heaviest, self.dtype, name, coordinates)
        self.base_norm: float | None = math.sqrt(found.base_energy) if coordinates is None else None
        """`||W_0||_F`; None where it is not known. Cores are of a base of zeros, and do not tell."""
        self._rounding_of_base = math.sqrt(found.rounding_energy)
        formats, reasons = _without_information(base, candidates, found, self.dtype)
        self.left_out: Mapping[str, str] = {expert.name: "weight 0" for expert in experts if expert.weight == 0} | {
            expert.name: reason for expert, reason in zip(candidates, reasons, strict=True) if reason is not None
        }
        """Name of every expert that has no part in the merge, and why."""
        informative = [t for t, reason in enumerate(reasons) if reason is None]
        self.experts = tuple(candidates[t] for t in informative)
        self.statistics = tuple(found.statistics[t] for t in informative)
        self._formats = tuple(formats[t] for t in informative)
        weights = math.fsum(expert.weight for expert in self.experts)
        self.shares = tuple(len(self.experts) * expert.weight / weights for expert in self.experts)
        self.energy_of_mean = found.summed_energy * (heaviest / weights) ** 2 if self.experts else 0.0
        """`||sum_t a_t D_t / T||_F^2`, the squared length of the mean update."""

    def __len__(self) -> int:
        """`T`: experts with information."""
        return len(self.experts)

    @property
    def shape(self) -> tuple[int, int]:
        """`(m, n)`."""
        m, n = self.base.shape if self.coordinates is None else self.coordinates.shape
        return m, n

    @property
    def buffer_shape(self) -> tuple[int, int]:
        """Shape of every task vector: `(m, n)`, or that of the cores."""
        rows, columns = self.base.shape
        return rows, columns

    @property
    def energies(self) -> tuple[float, ...]:
        """`e_t = ||D_t||_F^2`."""
        return tuple(measured.energy for measured in self.statistics)

    @property
    def rounding(self) -> float:
        """Largest singular value that rounding alone gives a task vector: weights are rounded where they are stored.

        `eps / 2 * rms(base) * (sqrt(m) + sqrt(n))`, `eps` of the working dtype: above the largest singular value of
        `[m, n]` independent rounding errors. 0 for cores, which are taken from factors and not from weights.
        """
        if self.coordinates is not None or self.base_norm is None:
            return 0.0
        m, n = self.shape
        return torch.finfo(self.dtype).eps / 2 * self.base_norm / math.sqrt(m * n) * (math.sqrt(m) + math.sqrt(n))

    @property
    def output_rounding(self) -> float:
        """`||.||_F` that rounding the merged weights to the base's dtype is expected to add; 0 for float32 and float64.

        Merged weights have the size of the base's.
        """
        if self.base.dtype not in COARSE_FORMATS or self.coordinates is not None:
            return 0.0
        return self._rounding_of_base

    def rounding_energies(self) -> list[float]:
        """Energy that rounding to the stored format is expected to have added to each `D_t`."""
        tensors = [expert.tensor for expert in self.experts]
        return expected_rounding_energies(self.base, tensors, self._formats, self.energies)

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
        scaled.unit = self.unit * unit
        scaled.base = self.base.to(self.dtype) / unit
        scaled.experts = tuple(replace(e, tensor=e.tensor.to(self.dtype) / unit) for e in self.experts)
        scaled.statistics = tuple(
            UpdateStatistics(energy=s.energy / unit**2, centered_energy=s.centered_energy / unit**2)
            for s in self.statistics
        )
        scaled.base_norm = None if self.base_norm is None else self.base_norm / unit
        scaled.energy_of_mean = self.energy_of_mean / unit**2
        return scaled

    def zeros(self, *shape: int) -> Tensor:
        """Zeros of a shape, in the working dtype, on the device of the base."""
        return self.base.new_zeros(shape, dtype=self.dtype)

    def without_copies(self) -> tuple[TaskVectors, tuple[int, ...]]:
        """Every expert once, with the summed weight of its exact copies; and which of them each expert here became."""
        kept: list[int] = []
        became: list[int] = []
        shares: list[float] = []
        for t, share in enumerate(self.shares):
            place = next((p for p, s in enumerate(kept) if self._are_copies(s, t)), len(kept))
            if place == len(kept):
                kept.append(t)
                shares.append(0.0)
            shares[place] += share
            became.append(place)
        distinct = copy(self)
        distinct.experts = tuple(self.experts[t] for t in kept)
        distinct.statistics = tuple(self.statistics[t] for t in kept)
        distinct._formats = tuple(self._formats[t] for t in kept)
        distinct.shares = tuple(share * len(kept) / len(self) for share in shares)
        return distinct, tuple(became)

    def with_shares(self, shares: Sequence[float]) -> TaskVectors:
        """The same task vectors with other shares, of mean 1; `energy_of_mean` stays that of the old ones."""
        other = copy(self)
        other.shares = tuple(shares)
        return other

    def _are_copies(self, s: int, t: int) -> bool:
        # The energies, measured the same way, differ unless the tensors are equal: almost no pair is compared in full.
        equal = self.statistics[s] == self.statistics[t] and self.experts[s].measured is self.experts[t].measured
        return equal and torch.equal(self.experts[s].tensor, self.experts[t].tensor)

    def task_vector(self, t: int, *, out: Tensor | None = None) -> Tensor:
        """`D_t`, `[m, n]`, working dtype, in storage of its own that the caller may overwrite; or in `out`."""
        return difference(self.experts[t].tensor, self.base, self.dtype, out=out)

    def row_panels(self) -> list[slice]:
        """The rows of `buffer_shape` in pieces for products."""
        return panels(self.base)

    def gram(self, t: int, *, rough: bool = False) -> Tensor:
        """`D_t^T D_t`, `[n, n]`; where it may be `rough`, by products of rows in bfloat16, which round it to that."""
        product = self.zeros(self.base.shape[1], self.base.shape[1])
        rounded = product.bfloat16() if rough else None
        for rows in self.row_panels():
            if rounded is None:
                add_gram_upper_(product, self.rows(t, rows))
            else:
                product.add_(add_gram_upper_(rounded, self.rows(t, rows).bfloat16(), keep=0.0))
        return mirror_upper_(product)

    def rows(self, t: int, rows: slice) -> Tensor:
        """Some rows of `D_t`, as `task_vector`."""
        return difference(self.experts[t].tensor[rows], self.base[rows], self.dtype)

    def sample(self, t: int, *, row_step: int, column_step: int) -> Tensor:
        """Every `row_step`-th row of `D_t` at every `column_step`-th column, working dtype."""
        rows, columns = slice(None, None, row_step), slice(None, None, column_step)
        return difference(self.experts[t].tensor[rows, columns], self.base[rows, columns], self.dtype)

    def sum(self) -> Tensor:
        """`sum_t a_t D_t`, `[m, n]`, working dtype, with the shares `a_t`."""
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
        """`sum_t a_t D_t / T`, `[m, n]`, working dtype."""
        return self.sum().div_(len(self))


@dataclass(frozen=True, kw_only=True)
class _OnePass:
    """What one pass over the base and the experts gives, which the host waits for once."""

    statistics: list[UpdateStatistics]
    summed_energy: float
    """`||sum_t w_t D_t / heaviest||_F^2`."""
    base_energy: float
    rounding_energy: float
    """Expected of the base's own format; 0 of one of more than 16 bits."""
    first_look: list[list[float]]
    """Whether the first values of the base and of each expert are exact in the coarse formats."""


def _without_information(
    base: Tensor, experts: Sequence[Expert], found: _OnePass, dtype: torch.dtype
) -> tuple[list[Formats], list[str | None]]:
    """Each expert's `Formats`, and why its update carries no information; None where it does."""
    if not any(update.energy > 0 for update in found.statistics):
        return [()] * len(experts), ["equal to the base here"] * len(experts)
    working = torch.finfo(dtype).eps ** 2 * found.base_energy
    of_base, *formats = storage_formats([base, *(expert.tensor for expert in experts)], found.first_look)
    reasons: list[str | None] = []
    floors = storage_floors(base, of_base, formats)
    of_the_base = roundings_of_the_base(
        base, of_base, [expert.tensor for expert in experts], formats, [update.energy for update in found.statistics]
    )
    for update, (floor, storage), rounded in zip(found.statistics, floors, of_the_base, strict=True):
        if update.energy <= working:
            reasons.append("equal to the base here")
        elif rounded is not None:
            reasons.append(f"the base differs from it here by rounding to {str(rounded).removeprefix('torch.')} only")
        elif update.energy <= floor:
            reasons.append(f"differs from the base here by rounding to {str(storage).removeprefix('torch.')} only")
        else:
            reasons.append(None)
    return formats, reasons


# Rows that differ by no more than this share of their energy are equal as far as float32 differences can tell.
_EQUAL_ROWS = 1e-12


def _measure(
    base: Tensor,
    experts: Sequence[Expert],
    heaviest: float,
    dtype: torch.dtype,
    name: str,
    coordinates: Coordinates | None,
) -> _OnePass:
    """Everything that is found in one pass, without a buffer.

    The sum is not divided by the sum of the weights: experts without information would change its rounding.
    """
    count = len(experts)
    m = base.shape[0] if coordinates is None else coordinates.shape[0]
    ones = None if coordinates is None else coordinates.ones_left.double()
    squares = base.new_zeros(count + 2, dtype=torch.float64)  # of each update, of their sum, of the base
    row_sums = base.new_zeros((count, base.shape[1]), dtype=torch.float64)
    start = 0
    for ours, *theirs in zip(blocks(base), *(blocks(expert.tensor) for expert in experts), strict=True):
        rows = slice(start, start + len(ours))
        start += len(ours)
        together = torch.zeros_like(ours, dtype=dtype)
        for t, (expert, tensor) in enumerate(zip(experts, theirs, strict=True)):
            update = difference(tensor, ours, dtype)
            together.add_(update, alpha=expert.weight / heaviest)
            precise = update.double()
            squares[t] += torch.dot(precise.flatten(), precise.flatten())
            row_sums[t] += precise.sum(dim=0) if ones is None else ones[rows] @ precise
            del update, precise
        squares[count] += squared_norms([together])[0]
        squares[count + 1] += squared_norms([ours])[0]
    looks = first_look([base, *(expert.tensor for expert in experts)])
    of_means = row_sums.square().sum(dim=1) / max(1, m)
    rounding = rounding_energy(base, base.dtype) if base.dtype in COARSE_FORMATS else squares.new_zeros(())
    *numbers, lost = torch.cat([squares, of_means, looks.flatten().double(), rounding[None]]).tolist()
    energies, (summed_energy, base_energy) = numbers[:count], numbers[count : count + 2]
    statistics = []
    for expert, energy, of_mean in zip(experts, energies, numbers[count + 2 : 2 * count + 2], strict=True):
        require_finite_update(energy, base, expert, name=name)
        centered = energy - of_mean
        statistics.append(
            UpdateStatistics(energy=energy, centered_energy=centered if centered > _EQUAL_ROWS * energy else 0.0)
        )
    flags, formats = numbers[2 * count + 2 :], looks.shape[1]
    return _OnePass(
        statistics=statistics,
        summed_energy=summed_energy,
        base_energy=base_energy,
        rounding_energy=lost,
        first_look=[flags[start : start + formats] for start in range(0, len(flags), formats)],
    )
