"""What a merge asks of those who make its shards."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Protocol

from mergekit_ace.engine.receipt import Receipt
from mergekit_ace.engine.shards import Shard


class Workers(Protocol):
    """Some number of workers who share a merge's shards."""

    @property
    def description(self) -> str:
        """Who they are, in words."""

    @property
    def elsewhere(self) -> bool:
        """Whether they are other processes, whose log is not this one's."""

    def make(self, shards: Sequence[Shard]) -> Generator[Receipt, None, None]:
        """Make every shard, in the order given as far as workers are free; yield each one's receipt when it is written.

        To be closed: what is being made is given up then.

        Raises:
            Exception: what kept a shard from being made. No further shard is begun then.
        """
