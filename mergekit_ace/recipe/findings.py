"""What is found to be wrong, or worth knowing, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Level = Literal["error", "warning", "hint"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing a person should know.

    Attributes:
        level: `error`: the merge fails, or is not the one the recipe asks for; `warning`: it may not be what is meant;
            `hint`: it could be better.
        what: a sentence with the names and numbers.
        remedy: what to change.
    """

    level: Level
    what: str
    remedy: str


_ORDER: tuple[Level, ...] = ("error", "warning", "hint")


def by_severity(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Errors first, then warnings, then hints; otherwise in the order found."""
    return tuple(sorted(findings, key=lambda finding: _ORDER.index(finding.level)))
