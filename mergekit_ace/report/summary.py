"""A report in a few numbers: how its tensors are treated, which lose most, and what the merge costs each expert."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from mergekit_ace.report.model import ExpertReport, Report, TensorReport
from mergekit_ace.report.wording import MEANING, label, number

_Losing = TypeVar("_Losing", "ExpertSummary", ExpertReport)
_MOST_LISTED = 5


@dataclass(frozen=True, kw_only=True)
class ExpertSummary:
    """One expert over the whole model. Means are over the tensors in which experts are weighed against each other."""

    expert: str
    tensors: int
    """How many it changed."""
    norm: float
    """`||D||_F` over all its tensors together."""
    energy_share: float
    """Mean share of the energy."""
    loss: float | None
    """Mean loss; None without merges."""
    measured_loss: float | None
    """Mean loss under the measured second moments; None where there are none."""


@dataclass(frozen=True, kw_only=True)
class EstimateSummary:
    """How good the estimates of one layer type were, over all experts whose inputs were measured."""

    kind: str
    matrices: int
    """How many, each expert's counted."""
    correlation: float
    """Mean correlation of the estimated and the measured second moment."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a terminal shows."""

    treatments: Mapping[str, int]
    """Number of tensors of each label that occurs."""
    experts: tuple[ExpertSummary, ...]
    """In recipe order."""
    ranked: tuple[TensorReport, ...]
    """Those with the largest mean loss, the largest first; without merges, with the largest heterogeneity. None where
    all are alike."""
    failed: tuple[TensorReport, ...]
    estimates: tuple[EstimateSummary, ...]
    """By layer type, in the order of the model; empty where nothing was measured."""
    seconds: float

    @property
    def highest_loss(self) -> ExpertSummary | None:
        """The one expert with the largest mean loss; None where several share it, to the digits that are shown."""
        return _sole(sorted(self._with_loss(), key=_loss, reverse=True))

    @property
    def lowest_loss(self) -> ExpertSummary | None:
        """The one expert with the smallest mean loss; None as above."""
        return _sole(sorted(self._with_loss(), key=_loss))

    def _with_loss(self) -> list[ExpertSummary]:
        return [expert for expert in self.experts if expert.loss is not None]


def summarize(report: Report, *, most: int = _MOST_LISTED) -> Summary:
    """Count, average and rank.

    Args:
        report: complete or not.
        most: how many tensors to rank.
    """
    counted = Counter(label(tensor) for tensor in report.tensors)
    ranked = sorted(compared(report), key=rank, reverse=True)
    alike = len(ranked) > 1 and number(rank(ranked[0])) == number(rank(ranked[-1]))
    return Summary(
        treatments={name: counted[name] for name in MEANING if counted[name]},
        experts=tuple(_expert(expert, report) for expert in report.experts),
        ranked=() if alike else tuple(ranked[:most]),
        failed=tuple(tensor for tensor in report.tensors if tensor.treatment == "failed"),
        estimates=_estimates(report.tensors),
        seconds=sum(tensor.seconds for tensor in report.tensors),
    )


def compared(report: Report) -> list[TensorReport]:
    """The tensors in which two experts or more are weighed against each other."""
    return [tensor for tensor in report.tensors if tensor.treatment == "merged" and len(tensor.experts) > 1]


def gate_statistic(tensor: TensorReport) -> float | None:
    """The heterogeneity that the tensor's gate goes by; the scale-free one where there is no gate."""
    if tensor.gate is not None and tensor.gate.statistic == "published":
        return tensor.heterogeneity_published
    return tensor.heterogeneity


def mean_loss(tensor: TensorReport) -> float | None:
    """Mean of the experts' losses in a tensor; None without a merge."""
    known = [expert.loss for expert in tensor.experts if expert.loss is not None]
    return sum(known) / len(known) if known else None


def highest_loss(tensor: TensorReport) -> ExpertReport | None:
    """The one expert that loses most in a tensor; None where several share that, to the digits that are shown."""
    known = [expert for expert in tensor.experts if expert.loss is not None]
    return _sole(sorted(known, key=_loss, reverse=True))


def rank(tensor: TensorReport) -> float:
    """What tensors are ranked by: mean loss, or heterogeneity where there is none."""
    loss = mean_loss(tensor)
    return loss if loss is not None else (gate_statistic(tensor) or 0.0)


def _sole(ordered: Sequence[_Losing]) -> _Losing | None:
    """The first, unless the second shows the same loss, or there is no second to compare it with."""
    if len(ordered) < 2 or number(_loss(ordered[0])) == number(_loss(ordered[1])):
        return None
    return ordered[0]


def _loss(expert: ExpertSummary | ExpertReport) -> float:
    return expert.loss if expert.loss is not None else 0.0


def _expert(name: str, report: Report) -> ExpertSummary:
    present = list(_of(name, report.tensors))
    weighed = list(_of(name, compared(report)))
    known = [expert.loss for expert in weighed if expert.loss is not None]
    measured = [expert.measured_loss for expert in weighed if expert.measured_loss is not None]
    return ExpertSummary(
        expert=name,
        tensors=len(present),
        norm=math.sqrt(sum(expert.norm**2 for expert in present)),
        energy_share=sum(expert.energy_share for expert in weighed) / len(weighed) if weighed else 0.0,
        loss=sum(known) / len(known) if known else None,
        measured_loss=sum(measured) / len(measured) if measured else None,
    )


def _estimates(tensors: Iterable[TensorReport]) -> tuple[EstimateSummary, ...]:
    by_kind: dict[str, list[float]] = {}
    for tensor in tensors:
        for expert in tensor.experts:
            if expert.estimate_correlation is not None:
                by_kind.setdefault(tensor.kind, []).append(expert.estimate_correlation)
    return tuple(
        EstimateSummary(kind=kind, matrices=len(found), correlation=sum(found) / len(found))
        for kind, found in by_kind.items()
    )


def _of(name: str, tensors: Iterable[TensorReport]) -> Iterable[ExpertReport]:
    return (expert for tensor in tensors for expert in tensor.experts if expert.expert == name)
