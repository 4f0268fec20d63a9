"""Tensors by glob patterns of their names."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase


def select_names(names: Sequence[str], patterns: Sequence[str]) -> frozenset[str]:
    """The names that match any of the patterns; all, if there is none.

    Raises:
        ValueError: A pattern matches no name.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"tensor pattern must match a tensor of the output; got {pattern!r}, which matches none of "
                f"{len(names)}, such as {names[0] if names else 'none'}"
            )
    return frozenset(name for name in names if not patterns or any(fnmatchcase(name, pattern) for pattern in patterns))
