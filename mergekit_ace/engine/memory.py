"""How much memory the workers of a machine may use where nobody says."""

from __future__ import annotations

from mergekit_ace.checks.memory import available_memory

_SHARE_OF_FREE = 0.8


def free_memory() -> int | None:
    """Most of the memory that programs can get on this machine; None where it is not known."""
    available = available_memory()
    return None if available is None else int(_SHARE_OF_FREE * available)
