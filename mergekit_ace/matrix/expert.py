"""One expert's tensor, its weight and its difference from the base."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from mergekit_ace.linalg.precision import all_finite


@dataclass(frozen=True, kw_only=True, eq=False)
class MeasuredMoment:
    """A second moment of an expert's inputs that was measured on data, `C = F^T F`.

    Attributes:
        factor: `F`, `[r, n]`, any floating dtype and device.
        error: share of the off-diagonal energy `sum_{i != j} c_ij^2` that is sampling error, in `[0, 1]`.
        tokens: how many inputs it is the mean of.
    """

    factor: Tensor
    error: float
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Participant:
    """An expert's part in the merge of a matrix, however its task vector is stored.

    Attributes:
        name: how messages call it.
        weight: its weight in the objective, `>= 0`; only ratios between experts matter. 0 leaves it out.
        measured: the second moment of its inputs, where that is known; else it is estimated from the task vector.
    """

    name: str
    weight: float = 1.0
    measured: MeasuredMoment | None = None


@dataclass(frozen=True, kw_only=True)
class Expert(Participant):
    """One expert's tensor.

    Attributes:
        tensor: `[m, n]` (or any shape for `mean_task_vector`), dtype and device of the base; borrowed, never modified.
    """

    tensor: Tensor


AnyParticipant = TypeVar("AnyParticipant", bound=Participant)


def voting_experts(experts: Sequence[AnyParticipant], *, name: str) -> list[AnyParticipant]:
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


def difference(tensor: Tensor, base: Tensor, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    """`tensor - base` in `dtype`, in `out` or in new storage: one buffer of that size and no second one."""
    if out is None:
        out = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
    else:
        out.copy_(tensor)
    return out.sub_(base)


def require_finite_base(base: Tensor, *, name: str) -> None:
    """Refuse a base that holds NaN or infinity, where it is copied and not subtracted from.

    Raises:
        ValueError: naming the tensor.
    """
    if not all_finite(base):
        raise ValueError(_not_finite(name, "the base", base.dtype))


def require_finite_update(energy: float, base: Tensor, expert: Expert, *, name: str) -> None:
    """Refuse an update whose energy `||expert - base||_F^2` is NaN or infinite.

    Raises:
        ValueError: naming the tensor and who holds the NaN or infinity.
    """
    if math.isfinite(energy):
        return
    # The norm of finite values in float64 cannot overflow, so one of the two holds NaN or infinity; find which.
    culprit = "the base" if not all_finite(base) else f"expert {expert.name}"
    if culprit != "the base" and all_finite(expert.tensor):
        culprit = f"the difference of expert {expert.name} and the base"
    raise ValueError(_not_finite(name, culprit, base.dtype))


def require_finite_factors(energy: float, dtype: torch.dtype, expert: str, *, name: str) -> None:
    """Refuse an update by factors whose energy is NaN or infinite, or beyond what its dtype can hold.

    Raises:
        ValueError: naming the tensor and the expert.
    """
    if not (energy < math.inf and math.sqrt(max(0.0, energy)) <= torch.finfo(dtype).max):
        raise ValueError(_not_finite(name, f"the update of expert {expert}", dtype))


def _not_finite(name: str, culprit: str, dtype: torch.dtype) -> str:
    remedy = "Repair or replace that checkpoint; nothing was merged from it."
    if dtype == torch.float16:  # it may be the merge's own, and the checkpoint's another
        remedy += " If it is stored in another dtype, it may exceed the range of dtype: float16; set dtype: float32."
    return f"{name}: every weight must be finite; {culprit} holds NaN or infinity. {remedy}"
