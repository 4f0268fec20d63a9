"""Task vectors of experts that are stored as whole tensors, beside the base."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mergekit_ace.linalg.blocks import blocks, panels
from mergekit_ace.linalg.precision import require_full_float32, squared_norms, working_dtype
from mergekit_ace.matrix.expert import Expert, difference, require_finite_update, voting_experts
from mergekit_ace.matrix.storage_rounding import (
    COARSE_FORMATS,
    Formats,
    expected_rounding_energies,
    first_look,
    largest_of_noise,
    rounding_energy,
    roundings_of_the_base,
    storage_floors,
    storage_formats,
)
from mergekit_ace.matrix.task_vectors import TaskVectors, UpdateStatistics, statistics_of


class StoredTaskVectors(TaskVectors):
    """Differences `D_t = expert - base`.

    Differences are taken in the working dtype: bfloat16 checkpoints differ from their base in the last bits, and a
    difference rounded to bfloat16 would keep 8 bits of an 8-bit number.

    An expert carries information when `||D_t||_F^2` exceeds the energy of rounding: `(eps ||base||_F)^2` with `eps` of
    the working dtype, and `||storage(base) - base||_F^2` where the expert was rounded to a coarser format than the base
    (a bfloat16 copy of a float32 base). Less is what storing the same weights in another format leaves, and trace
    normalization would give it the weight of an update. Nor does the model carry any that the base was rounded from.

    Args:
        base: `[m, n]`.
        experts: of the base's shape, dtype and device. Those of weight 0, and those without information, are left out.
        name: as in `TaskVectors`.
        depth: as in `TaskVectors`.

    Raises:
        ValueError: when a tensor holds NaN or infinity, a weight is negative or not finite, or no weight is positive.
        RuntimeError: the process runs float32 products in reduced precision, and every method takes products of these.
    """

    experts: tuple[Expert, ...]
    base_norm: float

    def __init__(
        self, base: Tensor, experts: Sequence[Expert], *, name: str = "the matrix", depth: int | None = None
    ) -> None:
        require_full_float32(base.device)
        dtype = working_dtype(base.dtype)
        candidates = voting_experts(experts, name=name)
        heaviest = max(expert.weight for expert in candidates)
        found = _measure(base, candidates, heaviest, dtype, name)
        formats, reasons = _without_information(base, candidates, found, dtype)
        super().__init__(
            experts, candidates, found.statistics, reasons, name=name, depth=depth, dtype=dtype, device=base.device
        )
        self.base = base
        self.base_norm = math.sqrt(found.base_energy)
        self._rounding_of_base = math.sqrt(found.rounding_energy)
        self._formats = tuple(own for own, reason in zip(formats, reasons, strict=True) if reason is None)
        weights = math.fsum(expert.weight for expert in self.experts)
        self.energy_of_mean = found.summed_energy * (heaviest / weights) ** 2 if self.experts else 0.0

    @property
    def shape(self) -> tuple[int, int]:
        """`(m, n)`."""
        m, n = self.base.shape
        return m, n

    @property
    def buffer_shape(self) -> tuple[int, int]:
        """`(m, n)`."""
        return self.shape

    @property
    def rounding(self) -> float:
        """That of errors of `eps / 2` of each stored weight, `eps` of the working dtype."""
        return largest_of_noise(torch.finfo(self.dtype).eps / 2 * self.base_norm, self.shape)

    @property
    def output_rounding(self) -> float:
        """0 for float32 and float64; merged weights have the size of the base's."""
        return self._rounding_of_base if self.base.dtype in COARSE_FORMATS else 0.0

    def rounding_energies(self) -> list[float]:
        """As `TaskVectors.rounding_energies`."""
        tensors = [expert.tensor for expert in self.experts]
        return expected_rounding_energies(self.base, tensors, self._formats, self.energies)

    def task_vector(self, t: int, *, out: Tensor | None = None) -> Tensor:
        """As `TaskVectors.task_vector`."""
        return difference(self.experts[t].tensor, self.base, self.dtype, out=out)

    def rows(self, t: int, rows: slice) -> Tensor:
        """As `TaskVectors.rows`."""
        return difference(self.experts[t].tensor[rows], self.base[rows], self.dtype)

    def apart(self, t: int, reference: int, rows: slice) -> Tensor:
        """As `TaskVectors.apart`: of the experts themselves, and not by way of the base."""
        return difference(self.experts[t].tensor[rows], self.experts[reference].tensor[rows], self.dtype)

    def row_panels(self) -> list[slice]:
        """As `TaskVectors.row_panels`."""
        return panels(self.base)

    def sample(self, t: int, *, row_step: int, column_step: int) -> Tensor:
        """Every `row_step`-th row of `D_t` at every `column_step`-th column, working dtype."""
        rows, columns = slice(None, None, row_step), slice(None, None, column_step)
        return difference(self.experts[t].tensor[rows, columns], self.base[rows, columns], self.dtype)

    def _are_copies(self, s: int, t: int) -> bool:
        return torch.equal(self.experts[s].tensor, self.experts[t].tensor)

    def _keep(self, experts: Sequence[int]) -> None:
        super()._keep(experts)
        self._formats = tuple(self._formats[t] for t in experts)

    def _divide(self, unit: float) -> None:
        self.base = self.base.to(self.dtype) / unit
        self.experts = tuple(replace(e, tensor=e.tensor.to(self.dtype) / unit) for e in self.experts)


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


def _measure(
    base: Tensor,
    experts: Sequence[Expert],
    heaviest: float,
    dtype: torch.dtype,
    name: str,
) -> _OnePass:
    """Everything that is found in one pass, without a buffer.

    The sum is not divided by the sum of the weights: experts without information would change its rounding.
    """
    count = len(experts)
    squares = base.new_zeros(count + 2, dtype=torch.float64)  # of each update, of their sum, of the base
    row_sums = base.new_zeros((count, base.shape[1]), dtype=torch.float64)
    for ours, *theirs in zip(blocks(base), *(blocks(expert.tensor) for expert in experts), strict=True):
        together = torch.zeros_like(ours, dtype=dtype)
        for t, (expert, tensor) in enumerate(zip(experts, theirs, strict=True)):
            update = difference(tensor, ours, dtype)
            together.add_(update, alpha=expert.weight / heaviest)
            precise = update.double()
            squares[t] += torch.dot(precise.flatten(), precise.flatten())
            row_sums[t] += precise.sum(dim=0)
            del update, precise
        squares[count] += squared_norms([together])[0]
        squares[count + 1] += squared_norms([ours])[0]
    looks = first_look([base, *(expert.tensor for expert in experts)])
    of_means = row_sums.square().sum(dim=1) / max(1, len(base))
    rounding = rounding_energy(base, base.dtype) if base.dtype in COARSE_FORMATS else squares.new_zeros(())
    *numbers, lost = torch.cat([squares, of_means, looks.flatten().double(), rounding[None]]).tolist()
    energies, (summed_energy, base_energy) = numbers[:count], numbers[count : count + 2]
    statistics = []
    for expert, energy, of_mean in zip(experts, energies, numbers[count + 2 : 2 * count + 2], strict=True):
        require_finite_update(energy, base, expert, name=name)
        statistics.append(statistics_of(energy, of_mean))
    flags, formats = numbers[2 * count + 2 :], looks.shape[1]
    return _OnePass(
        statistics=statistics,
        summed_energy=summed_energy,
        base_energy=base_energy,
        rounding_energy=lost,
        first_look=[flags[start : start + formats] for start in range(0, len(flags), formats)],
    )
