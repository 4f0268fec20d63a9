"""The rules of advice: what a person should know of a merge, and what to change, by method, settings and cause.

A rule looks at one merged matrix. `mergekit-yaml` logs the first matrix of a merge that a rule applies to;
`mergekit-ace inspect` counts them and shows the one that it applies to most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_ace.matrix.merge import MergeFacts
from mergekit_ace.matrix.options import Gate

LARGE_CHANGE = 0.2
"""Share of a weight's norm. Models whose layers a merge changed by more lost accuracy; updates add up where small."""
LARGE_RIDGE = 10.0
"""Times the mean eigenvalue of what is regularized: the result then is an average but for a few percent."""
LARGE_REFINEMENT = 3.0
"""Norm of what spectral refinement adds, over that of the largest update."""
LOST_DIGITS = 0.1
"""Condition number times the unit of rounding: a solve keeps about one digit."""
DOMINANT = 0.8
"""Share of the updates' energy above which one expert decides a solve without trace normalization."""
SHORT = 0.5
"""Norm of the merged update over that of the experts' plain average."""
MOSTLY = 0.5
"""Share of a result that no second moment decided."""

_UNITS = {"float32": 2**-23, "float64": 2**-52}


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What the rules look at: one matrix that two experts or more changed, and its merge.

    Attributes:
        name: of the tensor.
        method: the `merge_method`.
        settings: the method's parameters in force, presets resolved.
        facts: what the merge recorded of itself.
        gate: by which heterogeneous matrices are found; None where there is none.
        experts: those with information, in the order of the recipe.
        energies: `||D_t||_F^2` of each.
        heterogeneity: scale-free, `Var(log ||D_t||_F^2)`.
        dtype: in which the merge works, `float32` or `float64`.
        relative_change: `||W||_F` of the merged update, `lambda` included, over the norm of the base's weight; None
            where that is zero.
        relative_to_mean: `||W||_F` over the norm of the experts' weighted mean; None where that is zero.
    """

    name: str
    method: str
    settings: Mapping[str, Any]
    facts: MergeFacts
    gate: Gate | None
    experts: Sequence[str]
    energies: Sequence[float]
    heterogeneity: float
    dtype: str
    relative_change: float | None
    relative_to_mean: float | None


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One cause of trouble.

    Attributes:
        cause: its name.
        extent: how far it applies to a matrix; None: it does not.
        what: a clause with the numbers of one matrix, without its name.
        remedy: what to change in the recipe.
        least: share of the merged matrices that it must apply to before it is worth telling; a log, which sees one
            matrix after the other, leaves out rules that have one.
    """

    cause: str
    extent: Callable[[Evidence], float | None]
    what: Callable[[Evidence], str]
    remedy: Callable[[Evidence], str]
    least: float = 0.0


def log_messages(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """What a log should hold of a merged matrix: cause and message."""
    for rule in RULES:
        if not rule.least and rule.extent(evidence) is not None:
            yield rule.cause, f"{evidence.name}: {rule.what(evidence)}. {rule.remedy(evidence)}"


def table_merged_as_matrix(method: str) -> tuple[str, str]:
    """What is wrong with `embeddings: METHOD`, and the remedy."""
    return (
        f"embeddings: {method} merges an embedding table or output head as if it were a linear map on shared inputs; "
        "the authors leave such tables out",
        "Leave embeddings at its default, or set it to base.",
    )


def _change(e: Evidence) -> float | None:
    return _above(e.relative_change, LARGE_CHANGE)


def _change_what(e: Evidence) -> str:
    return (
        f"the merge changes the weight by {e.relative_change:.0%} of its norm, more than {LARGE_CHANGE:.0%}: updates "
        "that large do not add up"
    )


def _change_remedy(e: Evidence) -> str:
    decision = e.facts.decision
    # No such parameter, or set already, or the size of the updates has done it; or no second moment was used, on which
    # it has no effect.
    bound = e.settings.get("length_bound", True)
    by_size = bound == "auto" and decision is not None and decision.large > 0.5
    if bound is True or by_size or e.facts.averaged == 1:
        return "Set lambda nearer to 0, such as 0.5."
    return "Set length_bound: true, or lambda nearer to 0, such as 0.5."


def _ridge(e: Evidence) -> float | None:
    return _above(e.facts.ridge, LARGE_RIDGE) if e.facts.ridge_is_fixed else None


def _ridge_what(e: Evidence) -> str:
    ridge = e.facts.ridge
    assert ridge is not None
    if math.isinf(ridge):
        return f"the second moments are zero, so that epsilon ({e.settings['epsilon']:g}) is all that the solve sees"
    return (
        f"the ridge (epsilon: {e.settings['epsilon']:g}) is {ridge:.3g} times the mean eigenvalue of the second "
        "moments: the result is close to an average"
    )


def _ridge_remedy(e: Evidence) -> str:
    return "Set epsilon: auto, or a smaller number."


def _average(e: Evidence) -> float | None:
    return _above(e.facts.averaged, MOSTLY)


def _average_what(e: Evidence) -> str:
    share = "" if e.facts.averaged == 1 else f"{e.facts.averaged:.0%} "
    return (
        f"the updates are of low rank and their second moments correlate by {e.facts.correlation:.2g} only, as those "
        f"of adapters with independent random A matrices do: the result is {share}merged without them"
    )


def _average_remedy(e: Evidence) -> str:
    return (
        "Measure them on a few prompts, or on texts that the experts generate (mergekit-ace moments), or set "
        "correlation_threshold: 0 to use the estimates."
    )


def _refinement(e: Evidence) -> float | None:
    largest = max(e.energies, default=0.0) ** 0.5
    norm = e.facts.refinement_norm
    return None if norm is None or not largest else _above(norm / largest, LARGE_REFINEMENT)


def _refinement_what(e: Evidence) -> str:
    return f"spectral refinement adds {_refinement(e):.2g} times the norm of the largest update"


def _refinement_remedy(e: Evidence) -> str:
    gate = ", or raise heterogeneity_threshold" if e.gate is not None else ""
    return f"Set spectral_fraction: 0{gate}."


def _condition(e: Evidence) -> float | None:
    condition = e.facts.condition
    return None if condition is None else _above(condition * _UNITS[e.dtype], LOST_DIGITS)


def _condition_what(e: Evidence) -> str:
    return (
        f"the system has condition number {e.facts.condition:.1e}: a {e.dtype} solve keeps about one correct digit in "
        "its weakest directions"
    )


def _condition_remedy(e: Evidence) -> str:
    if e.facts.ridge_is_fixed:
        return "Raise epsilon, or set epsilon: auto."
    return "Set dtype: float64." if e.dtype == "float32" else "Set matrices: average for this tensor, by a filter."


def _dominant(e: Evidence) -> float | None:
    decision = e.facts.decision
    if decision is None or decision.trace_normalized or len(e.energies) < 2:
        return None
    return _above(max(e.energies) / sum(e.energies), DOMINANT)


def _dominant_what(e: Evidence) -> str:
    expert = e.experts[e.energies.index(max(e.energies))]
    return (
        f"{expert} has {_dominant(e):.0%} of the updates' energy, and second moments are not divided by their traces: "
        "the result follows that expert"
    )


def _dominant_remedy(e: Evidence) -> str:
    normalized = "lower heterogeneity_threshold" if e.gate is not None else "take wudi, which divides by the traces"
    return f"Give that expert a smaller weight, or {normalized}."


def _gate(e: Evidence) -> float | None:
    decision, gate = e.facts.decision, e.gate
    if decision is None or gate is None or gate.statistic != "published" or not decision.heterogeneous:
        return None
    # The other statistic must decide otherwise, or the remedy would change nothing.
    return decision.heterogeneity if e.heterogeneity <= gate.threshold else None


def _gate_what(e: Evidence) -> str:
    assert e.facts.decision is not None
    assert e.gate is not None
    found = e.facts.decision.heterogeneity
    value = "infinite" if math.isinf(found) else f"{found:.3g}"
    return (
        f"heterogeneity: published is {value}, above the threshold {e.gate.threshold:g}, though the updates are of "
        f"like norm (scale-free: {e.heterogeneity:.2g}): it divides by the mean of log ||D||^2, which is near 0 here"
    )


def _gate_remedy(e: Evidence) -> str:
    return "Set heterogeneity: scale_free."


def _short(e: Evidence) -> float | None:
    ratio = e.relative_to_mean
    return None if ratio is None or ratio >= SHORT else -ratio


def _short_what(e: Evidence) -> str:
    return f"the merged update has {e.relative_to_mean:.2g} times the norm of the experts' plain average"


def _short_remedy(e: Evidence) -> str:
    if e.settings.get("mean_over") == "all":
        return "Set mean_over: existing, or raise lambda."
    return "Raise lambda."


def _above(value: float | None, threshold: float) -> float | None:
    return value if value is not None and value > threshold else None


RULES: tuple[Rule, ...] = (
    Rule(cause="change", extent=_change, what=_change_what, remedy=_change_remedy),
    Rule(cause="ridge", extent=_ridge, what=_ridge_what, remedy=_ridge_remedy),
    Rule(cause="average", extent=_average, what=_average_what, remedy=_average_remedy),
    Rule(cause="refinement", extent=_refinement, what=_refinement_what, remedy=_refinement_remedy),
    Rule(cause="condition", extent=_condition, what=_condition_what, remedy=_condition_remedy),
    Rule(cause="dominant", extent=_dominant, what=_dominant_what, remedy=_dominant_remedy, least=0.5),
    Rule(cause="gate", extent=_gate, what=_gate_what, remedy=_gate_remedy),
    Rule(cause="short", extent=_short, what=_short_what, remedy=_short_remedy),
)
