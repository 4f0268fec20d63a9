"""The words and numbers that people read, the same in the terminal and on the page."""

from __future__ import annotations

import math
from collections.abc import Mapping

from mergekit_ace.report.model import TensorReport

MEANING: Mapping[str, str] = {
    "merged": "merged by the method",
    "heterogeneous": "above the gate's threshold: trace-normalized and refined",
    "homogeneous": "below the gate's threshold: neither trace-normalized nor refined",
    "uncorrelated": "second moments do not correlate: merged without them",
    "single expert": "one expert changed it: that expert's update",
    "unchanged": "no expert changed it: the base, bit for bit",
    "average": "base plus the mean update",
    "base": "kept as in the base",
    "copied": "a buffer, not a weight",
    "failed": "the merge stops here",
}
"""Label of a tensor -> what it means; in the order in which they are listed."""


def label(tensor: TensorReport) -> str:
    """How a tensor is treated, in one of the words of `MEANING`: its treatment, and for a merge what was decided."""
    facts = tensor.merge
    if tensor.treatment != "merged" or facts is None or facts.decision is None:
        return tensor.treatment
    if facts.averaged == 1:
        return "uncorrelated"
    if facts.decision.heterogeneous is None:
        return "merged"
    return "heterogeneous" if facts.decision.heterogeneous else "homogeneous"


def number(value: float) -> str:
    """Three significant digits; powers of ten only where they are shorter."""
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}"


def optional(value: float | None) -> str:
    """As `number`; nothing for what was not measured."""
    return "" if value is None else number(value)


def percent(share: float) -> str:
    """A share in whole percent."""
    return f"{share:.0%}"
