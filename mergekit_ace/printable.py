"""Text that comes from checkpoints, fit to be shown."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text with control characters spelled out: names come from checkpoints, and terminals obey some."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
