"""What in a report a person should act on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import median

from mergekit_ace.methods.advice import LARGE
from mergekit_ace.recipe.findings import Finding, by_severity
from mergekit_ace.report.model import LayerReport, Report
from mergekit_ace.report.naming import short_names
from mergekit_ace.report.summary import SOLVED, compared_layers

DROWNED = 1.0
"""A relative ridge above this: the solve follows the ridge more than the second moments."""
ILL_CONDITIONED = 1e6
"""A condition number above this leaves a float32 solve about one correct digit."""
DOMINANT = 0.8
"""Share of the trace above which one expert decides a layer."""
SIMILAR_NORMS = 0.5
"""Scale-free heterogeneity below this: the experts' norms differ by a factor of two at most, for two experts."""
SHRUNKEN = 0.25
"""Norm of the merged update over the experts' below which little of any is left."""


def advise(report: Report) -> tuple[Finding, ...]:
    """Every rule's findings, the gravest first."""
    return by_severity(finding for rule in _RULES for finding in rule(report))


def _failures(report: Report) -> Iterator[Finding]:
    for layer in report.layers:
        if layer.error is not None:
            yield Finding(
                level="error",
                what=f"{layer.name} cannot be merged: {layer.error}",
                remedy="Repair or replace that checkpoint; the merge would stop here.",
            )


def _absent(report: Report) -> Iterator[Finding]:
    if not report.complete or any(layer.branch == "failed" for layer in report.layers):
        return
    changed = {expert.expert for layer in report.layers for expert in layer.experts}
    unweighted = {out.expert for layer in report.layers for out in layer.left_out if out.reason == "weight 0"}
    for expert in report.experts:
        if expert not in changed | unweighted and report.base is not None:
            yield Finding(
                level="error",
                what=f"{expert} equals the base in every tensor, so it adds nothing",
                remedy="Check its path: it may be the base itself, or an adapter that was never trained.",
            )


def _drowned(report: Report) -> Iterator[Finding]:
    layers = _solved(report)
    drowned = [layer for layer in layers if layer.ridge is not None and layer.ridge > DROWNED]
    if drowned:
        worst = max(drowned, key=lambda layer: layer.ridge or 0.0)
        yield Finding(
            level="warning",
            what=f"the ridge outweighs the second moments in {_of(drowned, layers)}; most in {worst.name}, where it is "
            f"{worst.ridge:.3g} times the mean eigenvalue: those layers are close to a plain average",
            remedy="Lower epsilon, or set epsilon: auto.",
        )


def _ill_conditioned(report: Report) -> Iterator[Finding]:
    layers = _solved(report)
    bad = [layer for layer in layers if layer.condition is not None and layer.condition > ILL_CONDITIONED]
    if bad:
        worst = max(bad, key=lambda layer: layer.condition or 0.0)
        yield Finding(
            level="warning",
            what=f"the system is ill-conditioned in {_of(bad, layers)}; most in {worst.name}, with condition number "
            f"{worst.condition:.1e}: rounding and noise are amplified there",
            remedy="Raise epsilon, or set epsilon: auto.",
        )


def _dominated(report: Report) -> Iterator[Finding]:
    layers = compared_layers(report)
    short = short_names(report.experts)
    for name in report.experts:
        shares = [e.trace_share for layer in layers for e in layer.experts if e.expert == name]
        if len(shares) * 2 > len(layers) and median(shares) > DOMINANT:
            yield Finding(
                level="warning",
                what=f"{short[name]} holds {median(shares):.0%} of the trace in the middle layer: where second moments "
                "are not trace-normalized, the merge is hardly more than this expert",
                remedy=f"Give {short[name]} a smaller weight, or lower heterogeneity_threshold.",
            )


def _unreliable_gate(report: Report) -> Iterator[Finding]:
    layers = _solved(report)
    opened = [
        layer
        for layer in layers
        if layer.branch == "heterogeneous"
        and layer.gate is not None
        and layer.gate.statistic == "published"
        and layer.gate.threshold > 0
        and (layer.heterogeneity_scale_free or 0.0) < SIMILAR_NORMS
    ]
    if opened:
        yield Finding(
            level="warning",
            what=f"{_of(opened, layers)} count as heterogeneous though the experts' updates are of similar size: the "
            "published statistic divides by the mean of the log norms, which is near 0 there",
            remedy="Set heterogeneity: scale_free.",
        )


def _norms(report: Report) -> Iterator[Finding]:
    layers = [layer for layer in _solved(report) if layer.merged is not None]
    large = [layer for layer in layers if _change(layer) > LARGE]
    shrunken = [layer for layer in layers if layer.merged is not None and layer.merged.relative_norm < SHRUNKEN]
    if large:
        worst = max(large, key=_change)
        yield Finding(
            level="warning",
            what=f"the merge changes the weights by more than {LARGE:.0%} of their norm in {_of(large, layers)}; most "
            f"in {worst.name}, by {_change(worst):.0%}: updates this large do not add up",
            remedy="Set length_bound: true, or lambda below 1.",
        )
    if shrunken:
        yield Finding(
            level="warning",
            what=f"the merged update is less than {SHRUNKEN:g} times as large as the experts' in "
            f"{_of(shrunken, layers)}: little of any expert is left there",
            remedy="Raise lambda, or lower epsilon.",
        )


_RULES: tuple[Callable[[Report], Iterator[Finding]], ...] = (
    _failures,
    _absent,
    _drowned,
    _ill_conditioned,
    _dominated,
    _unreliable_gate,
    _norms,
)


def _change(layer: LayerReport) -> float:
    return (layer.merged.relative_change if layer.merged else None) or 0.0


def _solved(report: Report) -> list[LayerReport]:
    return [layer for layer in report.layers if layer.branch in SOLVED]


def _of(some: Sequence[LayerReport], layers: Sequence[LayerReport]) -> str:
    return f"{len(some)} of {len(layers)} solved layers"
