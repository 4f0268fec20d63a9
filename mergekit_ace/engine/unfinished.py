"""A shard whose tensors are merged, while its file is brought to the disk behind the merge of the next one."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Executor, Future

from mergekit_ace.engine.receipt import Receipt

Finish = Callable[[Callable[[], float]], Receipt]
"""Finishes the file and leaves its receipt; it is told how to ask for the seconds that were waited for it."""


class Unfinished:
    """A file that is being finished.

    Args:
        thread: where.
        finish: what is to be done there, in the order in which it is given.
    """

    def __init__(self, thread: Executor, finish: Finish) -> None:
        self._wanted: float | None = None
        self._receipt: Future[Receipt] = thread.submit(finish, self._waited)

    def receipt(self) -> Receipt:
        """Wait until the file is finished.

        Raises:
            OSError: of the file system, naming the file.
        """
        if self._wanted is None:
            self._wanted = time.perf_counter()
        return self._receipt.result()

    def when_finished(self, call: Callable[[Unfinished], None]) -> None:
        """Have a function called when the receipt is there or cannot be had, in whatever thread."""
        self._receipt.add_done_callback(lambda _: call(self))

    def _waited(self) -> float:
        return 0.0 if self._wanted is None else time.perf_counter() - self._wanted
