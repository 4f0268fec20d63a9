"""The task vectors of one weight matrix: what each expert changed, taken one at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_ace.linalg.blocks import blocks
from mergekit_ace.linalg.precision import all_finite, require_full_float32, squared_norm, working_dtype


@dataclass(frozen=True, kw_only=True)
class Expert:
    """One expert's tensor in a layer.

    Attributes:
        name: how messages call it.
        tensor: `[m, n]` (or any shape for `mean_task_vector`), dtype and device of the base; borrowed, never modified.
        weight: its weight in the objective, `>= 0`; only ratios between experts matter. 0 leaves it out.
    """

    name: str
    tensor: Tensor
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class UpdateStatistics:
    """What one pass over an expert's task vector `D = 1 mu + C` says, in float64."""

    energy: float
    """`||D||_F^2`."""
    centered_energy: float
    """`||C||_F^2 = tr C^T C = ||D||_F^2 - m ||mu||^2`; 0 when all rows are equal to within rounding."""


class TaskVectors:
    """The experts of one layer that carry information in it, and their task vectors `D_t = expert - base` on demand.

    Differences are taken in the working dtype: bfloat16 checkpoints differ from their base in the last bits, and a
    difference rounded to bfloat16 would keep 8 bits of an 8-bit number.

    An expert carries information when `||D_t||_F > eps ||base||_F`, `eps` of the working dtype: less is what storing
    the same weights in another format leaves (float16 rounds the smallest bfloat16 numbers), and a trace-normalized
    ridge would turn it into the loudest voice of all.

    Args:
        base: `[m, n]`.
        experts: of the base's shape, dtype and device. Those of weight 0, and those without information, are left out.
        name: the layer's name, for messages.

    Raises:
        ValueError: when a tensor holds NaN or infinity, a weight is negative or not finite, or no weight is positive.
        RuntimeError: the process runs float32 products in reduced precision, and every method takes products of these.
    """

    def __init__(self, base: Tensor, experts: Sequence[Expert], *, name: str = "the layer") -> None:
        require_full_float32(base.device)
        self.name = name
        self.base = base
        self.dtype = working_dtype(base.dtype)
        candidates = voting_experts(experts, name=name)
        heaviest = max(expert.weight for expert in candidates)
        statistics, summed_energy = _measure(base, candidates, heaviest, self.dtype, name)
        noise = _storage_noise(base, self.dtype) if any(measured.energy > 0 for measured in statistics) else 0.0
        informative = [pair for pair in zip(candidates, statistics, strict=True) if pair[1].energy > noise]
        self.left_out = tuple(expert.name for expert in experts if not any(expert is kept for kept, _ in informative))
        self.experts = tuple(expert for expert, _ in informative)
        self.statistics = tuple(measured for _, measured in informative)
        weights = math.fsum(expert.weight for expert in self.experts)
        self.shares = tuple(len(self.experts) * expert.weight / weights for expert in self.experts)
        self.energy_of_mean = summed_energy * (heaviest / weights) ** 2 if self.experts else 0.0
        """`||sum_t a_t D_t / T||_F^2`, the squared length of the mean update."""

    def __len__(self) -> int:
        """`T`: experts with information."""
        return len(self.experts)

    @property
    def shape(self) -> tuple[int, int]:
        """`(m, n)`."""
        m, n = self.base.shape
        return m, n

    @property
    def energies(self) -> tuple[float, ...]:
        """`e_t = ||D_t||_F^2`."""
        return tuple(measured.energy for measured in self.statistics)

    @property
    def rounding(self) -> float:
        """Singular values up to this say nothing in a task vector: weights are rounded where they are stored.

        `eps / 2 * rms(base) * (sqrt(m) + sqrt(n))`, `eps` of the working dtype: above the largest singular value of
        `[m, n]` independent rounding errors.
        """
        m, n = self.shape
        rms = math.sqrt(squared_norm(self.base) / (m * n))
        return torch.finfo(self.dtype).eps / 2 * rms * (math.sqrt(m) + math.sqrt(n))

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
        distinct.shares = tuple(share * len(kept) / len(self) for share in shares)
        return distinct, tuple(became)

    def _are_copies(self, s: int, t: int) -> bool:
        # The energies, measured the same way, differ unless the tensors are equal: almost no pair is compared in full.
        equal = self.statistics[s] == self.statistics[t]
        return equal and torch.equal(self.experts[s].tensor, self.experts[t].tensor)

    def task_vector(self, t: int) -> Tensor:
        """`D_t`, `[m, n]`, working dtype, in storage of its own that the caller may overwrite."""
        return difference(self.experts[t].tensor, self.base, self.dtype)

    def sum(self) -> Tensor:
        """`sum_t a_t D_t`, `[m, n]`, working dtype, with the shares `a_t`."""
        total = self.base.new_zeros(self.shape, dtype=self.dtype)
        for t, share in enumerate(self.shares):
            total.add_(self.task_vector(t), alpha=share)
        return total


def _storage_noise(base: Tensor, dtype: torch.dtype) -> float:
    """`(eps ||base||_F)^2`, the energy below which a difference says nothing."""
    return torch.finfo(dtype).eps ** 2 * squared_norm(base)


def voting_experts(experts: Sequence[Expert], *, name: str) -> list[Expert]:
    """The experts of positive weight.

    Raises:
        ValueError: when a weight is negative or not finite, or none is positive.
    """
    for expert in experts:
        if not (math.isfinite(expert.weight) and expert.weight >= 0):
            raise ValueError(
                f"{name}: parameter weight of expert {expert.name} must be a finite number of at least 0; "
                f"got {expert.weight}"
            )
    voting = [expert for expert in experts if expert.weight > 0]
    if not voting:
        raise ValueError(
            f"{name}: parameter weight must be positive for at least one expert; got 0 for all of "
            f"{', '.join(expert.name for expert in experts)}"
        )
    return voting


def difference(tensor: Tensor, base: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor - base` in `dtype`, new storage, one buffer of that size and no second one."""
    widened = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
    return widened.sub_(base)


def mean_task_vector(base: Tensor, experts: Sequence[Expert], *, name: str) -> Tensor:
    """`sum_t w_t D_t / sum_t w_t`, any shape, working dtype: how tensors that are not matrices are merged.

    Raises:
        ValueError: as `TaskVectors`.
    """
    voting = voting_experts(experts, name=name)
    dtype = working_dtype(base.dtype)
    total = torch.zeros_like(base, dtype=dtype, memory_format=torch.contiguous_format)
    weights = math.fsum(expert.weight for expert in voting)
    for expert in voting:
        squares = base.new_zeros((), dtype=torch.float64)
        for ours, theirs, sums in zip(blocks(base), blocks(expert.tensor), blocks(total), strict=True):
            update = difference(theirs, ours, dtype)
            squares += update.double().square().sum()
            sums.add_(update, alpha=expert.weight / weights)
        _require_finite(float(squares), base, expert, name)
    return total


# Rows that differ by no more than this share of their energy are equal as far as float32 differences can tell.
_EQUAL_ROWS = 1e-12


def _measure(
    base: Tensor, experts: Sequence[Expert], heaviest: float, dtype: torch.dtype, name: str
) -> tuple[list[UpdateStatistics], float]:
    """What each expert's update says, and `||sum_t w_t D_t / heaviest||_F^2`, in one pass and no buffer.

    Not divided by the sum of the weights: experts without information would change its rounding.
    """
    m, n = base.shape
    squares = base.new_zeros(len(experts), dtype=torch.float64)
    row_sums = base.new_zeros((len(experts), n), dtype=torch.float64)
    summed_square = base.new_zeros((), dtype=torch.float64)
    for ours, *theirs in zip(blocks(base), *(blocks(expert.tensor) for expert in experts), strict=True):
        together = torch.zeros_like(ours, dtype=dtype)
        for t, (expert, tensor) in enumerate(zip(experts, theirs, strict=True)):
            update = difference(tensor, ours, dtype)
            together.add_(update, alpha=expert.weight / heaviest)
            precise = update.double()
            squares[t] += torch.dot(precise.flatten(), precise.flatten())
            row_sums[t] += precise.sum(dim=0)
        precise = together.double()
        summed_square += torch.dot(precise.flatten(), precise.flatten())
    statistics = []
    of_means = row_sums.square().sum(dim=1) / max(1, m)
    for expert, energy, of_mean in zip(experts, squares.tolist(), of_means.tolist(), strict=True):
        _require_finite(energy, base, expert, name)
        centered = energy - of_mean
        statistics.append(
            UpdateStatistics(energy=energy, centered_energy=centered if centered > _EQUAL_ROWS * energy else 0.0)
        )
    return statistics, float(summed_square)


def require_finite_base(base: Tensor, *, name: str) -> None:
    """Refuse a base that holds NaN or infinity, where it is copied and not subtracted from.

    Raises:
        ValueError: naming the tensor.
    """
    if not all_finite(base):
        raise ValueError(_not_finite(name, "the base"))


def _require_finite(norm: float, base: Tensor, expert: Expert, name: str) -> None:
    if math.isfinite(norm):
        return
    # The norm of finite values in float64 cannot overflow, so one of the two holds NaN or infinity; say which.
    culprit = "the base" if not all_finite(base) else f"expert {expert.name}"
    if culprit != "the base" and all_finite(expert.tensor):
        culprit = f"the difference of expert {expert.name} and the base"
    raise ValueError(_not_finite(name, culprit))


def _not_finite(name: str, culprit: str) -> str:
    return (
        f"{name}: every weight must be finite; {culprit} holds NaN or infinity. "
        "Repair or replace that checkpoint; nothing was merged from it."
    )
