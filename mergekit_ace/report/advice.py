"""What in a report a person should act on: the rules of the methods applied to it, and what only a report shows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator

from mergekit_ace.methods.advice import RULES, Evidence, Rule, table_merged_as_matrix
from mergekit_ace.recipe.findings import Finding, by_severity
from mergekit_ace.report.model import Report, TensorReport
from mergekit_ace.report.naming import short_names
from mergekit_ace.report.summary import compared, summarize
from mergekit_ace.report.wording import number
from mergekit_ace.tensor_treatment import HEAD_REASON, is_embedding

LOST = 1.0
"""Mean loss above which an expert loses by the merge: the base is nearer to it."""
_MOSTLY_ROUNDING = 1 / 3
"""Of an update's energy. Experts of a chat model with updates of a tenth of a percent have 36 to 55 percent; a merge of
them keeps a point less of their gain when it is rounded to bfloat16 once more."""


def advise(report: Report) -> tuple[Finding, ...]:
    """Every finding, errors first."""
    return by_severity(finding for rule in _OF_REPORTS for finding in rule(report))


def _failures(report: Report) -> Iterator[Finding]:
    for tensor in report.tensors:
        if tensor.error is not None:
            yield Finding(
                level="error",
                what=f"{tensor.name} cannot be merged: {tensor.error}",
                remedy="Repair or replace that checkpoint; the merge stops there.",
            )


def _without_effect(report: Report) -> Iterator[Finding]:
    if not report.complete or report.base is None or any(t.treatment == "failed" for t in report.tensors):
        return
    changed = {expert.expert for tensor in report.tensors for expert in tensor.experts}
    left_out = [out for tensor in report.tensors for out in tensor.left_out]
    partly = report.selection is not None
    for name in report.experts:
        reasons = [out.reason for out in left_out if out.expert == name]
        if name in changed or "weight 0" in reasons:
            continue
        rounding = any("rounding" in reason for reason in reasons)
        difference = "differs from the base by rounding only" if rounding else "equals the base"
        yield Finding(
            level="warning" if partly else "error",
            what=f"{name} {difference} in every tensor" + (" that was measured" if partly else ", so it adds nothing"),
            remedy="Check its path: it may be the base itself, or an adapter that was never trained.",
        )


def _of_matrices(report: Report) -> Iterator[Finding]:
    short = short_names(report.experts)
    merged = [_evidence(tensor, report, short) for tensor in compared(report) if tensor.merge is not None]
    for rule in RULES:
        extents = [(extent, e) for e in merged if (extent := rule.extent(e)) is not None]
        if extents and len(extents) > rule.least * len(merged):
            yield _finding(rule, max(extents, key=lambda pair: pair[0])[1], len(extents), len(merged))


def _finding(rule: Rule, worst: Evidence, count: int, of: int) -> Finding:
    others = f" ({count} of {of} merged matrices, this one most)" if count > 1 else f" (1 of {of} merged matrices)"
    return Finding(level="warning", what=f"{worst.name}: {rule.what(worst)}{others}", remedy=rule.remedy(worst))


def _tables(report: Report) -> Iterator[Finding]:
    tables = [
        tensor
        for tensor in compared(report)
        if tensor.merge is not None and is_embedding(tensor.name, None) and tensor.reason != HEAD_REASON
    ]
    if tables:
        what, remedy = table_merged_as_matrix(report.method)
        yield Finding(level="warning", what=f"{tables[0].name}: {what}", remedy=remedy)


def _lost_experts(report: Report) -> Iterator[Finding]:
    short = short_names(report.experts)
    losses = {short[e.expert]: e.loss for e in summarize(report).experts if e.loss is not None}
    lost = {name: loss for name, loss in losses.items() if loss > LOST}
    if lost and len(lost) == len(losses):
        yield Finding(
            level="warning",
            what=f"every expert has a mean loss above 1 (the smallest is {number(min(lost.values()))}): under the "
            "experts' own second moments the merged model is farther from them than the base",
            remedy="Set lambda nearer to 0.",
        )
        return
    for name, loss in lost.items():
        yield Finding(
            level="warning",
            what=f"{name} has a mean loss of {number(loss)}: under its own second moments the merged model is farther "
            "from it than the base",
            remedy=f"Give {name} a larger weight, or leave it out.",
        )


def _rounded_updates(report: Report) -> Iterator[Finding]:
    short = short_names(report.experts)
    merged = [expert for tensor in compared(report) for expert in tensor.experts]
    for name in report.experts:
        shares = [e.rounding_share for e in merged if e.expert == name and e.rounding_share is not None]
        if shares and (share := statistics.fmean(shares)) > _MOSTLY_ROUNDING:
            yield Finding(
                level="hint",
                what=f"{short[name]} has {share:.0%} of its update's energy from rounding to the 16-bit format that it "
                "is stored in: an estimate, mean over the matrices",
                remedy="Take its float32 checkpoint where there is one, and write the merge in float32 "
                "(out_dtype: float32).",
            )


_OF_REPORTS: tuple[Callable[[Report], Iterator[Finding]], ...] = (
    _failures,
    _without_effect,
    _of_matrices,
    _tables,
    _lost_experts,
    _rounded_updates,
)


def _evidence(tensor: TensorReport, report: Report, short: dict[str, str]) -> Evidence:
    assert tensor.merge is not None
    assert tensor.merged is not None
    return Evidence(
        name=tensor.name,
        method=report.method,
        settings=tensor.parameters,
        facts=tensor.merge,
        gate=tensor.gate,
        experts=[short[expert.expert] for expert in tensor.experts],
        energies=[expert.norm**2 for expert in tensor.experts],
        heterogeneity=tensor.heterogeneity or 0.0,
        dtype=tensor.dtype or "float32",
        relative_change=tensor.merged.relative_change,
        relative_to_mean=tensor.merged.relative_to_mean,
    )
