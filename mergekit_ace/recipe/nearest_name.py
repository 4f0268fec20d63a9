"""The known name nearest to a misspelled one."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is nearest, whatever its capitals; None where none is near."""
    by_lower = {word.lower(): word for word in known}
    matches = get_close_matches(name.lower(), list(by_lower), n=1)
    return by_lower[matches[0]] if matches else None


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """`nearest` as a question."""
    meant = nearest(name, known)
    return f"Did you mean {meant}?" if meant else None
