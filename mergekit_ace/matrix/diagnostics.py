"""Whether a merge also estimates what only a report or a log reads.

A context rather than an argument: it changes no result, and would otherwise pass through every method's signature.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_WANTED: ContextVar[bool] = ContextVar("mergekit_ace_diagnostics", default=False)


def diagnostics_wanted() -> bool:
    """True within `with diagnostics():` of this thread."""
    return _WANTED.get()


@contextmanager
def diagnostics(wanted: bool = True) -> Iterator[None]:
    """Have merges within the block estimate condition numbers too, at a few percent of their time."""
    token = _WANTED.set(wanted)
    try:
        yield
    finally:
        _WANTED.reset(token)
