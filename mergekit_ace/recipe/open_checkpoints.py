"""The checkpoints that a thread has open through mergekit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mergekit.options import MergeOptions

from mergekit_ace.mergekit_internals import LoaderCache


@contextmanager
def open_checkpoints(options: MergeOptions) -> Iterator[LoaderCache]:
    """The table of open checkpoints that mergekit keeps for this thread, empty and closed at the end.

    The class's own table is shared by the whole process and keeps every file open.
    """
    loaders = LoaderCache()
    outer = vars(loaders).copy()
    loaders.setup(options=options)
    loaders.loaders = {}
    try:
        yield loaders
    finally:
        vars(loaders).clear()
        vars(loaders).update(outer)
