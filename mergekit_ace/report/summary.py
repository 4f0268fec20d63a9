"""A report in a few numbers: which branches its layers take, which are worst, and what the merge costs each expert."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from mergekit_ace.report.model import Branch, LayerReport, Report

SOLVED: tuple[Branch, ...] = ("heterogeneous", "homogeneous", "method")
"""The branches in which experts are weighed against each other."""


@dataclass(frozen=True, kw_only=True)
class ExpertSummary:
    """One expert over the whole model. Means are over the layers in which experts are weighed against each other."""

    expert: str
    layers: int
    """Tensors that the expert changed."""
    norm: float
    """`||D||_F` over all its tensors together."""
    trace_share: float
    """Mean share of the trace."""
    loss: float | None
    """Mean loss; None without solves."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a terminal shows."""

    branches: Mapping[Branch, int]
    """Number of layers in each branch that occurs."""
    experts: tuple[ExpertSummary, ...]
    """In recipe order."""
    worst: tuple[LayerReport, ...]
    """Layers with the largest mean loss, the worst first; without solves, those with the largest heterogeneity."""
    failed: tuple[LayerReport, ...]
    seconds: float

    @property
    def most_hurt(self) -> ExpertSummary | None:
        """The expert with the largest mean loss."""
        return max(self._weighed(), key=_loss, default=None)

    @property
    def least_hurt(self) -> ExpertSummary | None:
        """The expert with the smallest mean loss."""
        return min(self._weighed(), key=_loss, default=None)

    def _weighed(self) -> list[ExpertSummary]:
        return [expert for expert in self.experts if expert.loss is not None]


def summarize(report: Report, *, worst: int = 5) -> Summary:
    """Count, average and rank.

    Args:
        report: complete or not.
        worst: how many of the worst layers.
    """
    counted = Counter(layer.branch for layer in report.layers)
    return Summary(
        branches={branch: counted[branch] for branch in get_args(Branch) if counted[branch]},
        experts=tuple(_expert(expert, report) for expert in report.experts),
        worst=tuple(sorted(compared_layers(report), key=badness, reverse=True)[:worst]),
        failed=tuple(layer for layer in report.layers if layer.branch == "failed"),
        seconds=sum(layer.seconds for layer in report.layers),
    )


def compared_layers(report: Report) -> list[LayerReport]:
    """The layers in which two experts or more are weighed against each other."""
    return [layer for layer in report.layers if layer.branch in SOLVED and len(layer.experts) > 1]


def gate_statistic(layer: LayerReport) -> float | None:
    """The heterogeneity that the layer's gate goes by; the published one where there is no gate."""
    if layer.gate is not None and layer.gate.statistic == "scale_free":
        return layer.heterogeneity_scale_free
    return layer.heterogeneity


def mean_loss(layer: LayerReport) -> float | None:
    """Mean of the experts' losses in a layer; None without solves."""
    known = [expert.loss for expert in layer.experts if expert.loss is not None]
    return sum(known) / len(known) if known else None


def badness(layer: LayerReport) -> float:
    """What layers are ranked by: mean loss, or heterogeneity where there is none."""
    loss = mean_loss(layer)
    return loss if loss is not None else (gate_statistic(layer) or 0.0)


def _expert(name: str, report: Report) -> ExpertSummary:
    present = [expert for layer in report.layers for expert in layer.experts if expert.expert == name]
    weighed = [expert for layer in compared_layers(report) for expert in layer.experts if expert.expert == name]
    known = [expert.loss for expert in weighed if expert.loss is not None]
    return ExpertSummary(
        expert=name,
        layers=len(present),
        norm=math.sqrt(sum(expert.norm**2 for expert in present)),
        trace_share=sum(expert.trace_share for expert in weighed) / len(weighed) if weighed else 0.0,
        loss=sum(known) / len(known) if known else None,
    )


def _loss(expert: ExpertSummary) -> float:
    return expert.loss if expert.loss is not None else 0.0
