"""The words and numbers that people read, the same in the terminal and on the page."""

from __future__ import annotations

import math
from collections.abc import Mapping

from mergekit_ace.report.model import Branch

BRANCH_MEANING: Mapping[Branch, str] = {
    "heterogeneous": "above the threshold: normalized and refined",
    "homogeneous": "below the threshold: solved as they are",
    "method": "merged by the method",
    "uncorrelated": "second moments that share nothing: averaged",
    "single expert": "one expert changed it: its update, exactly",
    "frozen": "no expert changed it: the base, bit for bit",
    "average": "base plus the mean update",
    "base": "kept as in the base",
    "copied": "a buffer, not a weight",
    "failed": "the merge would stop here",
}


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


def percent(share: float) -> str:
    """A share in whole percent."""
    return f"{share:.0%}"
