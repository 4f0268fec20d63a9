"""The process itself as the only worker."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

from mergekit_ace.engine.receipt import Receipt
from mergekit_ace.engine.shard_maker import ShardMaker
from mergekit_ace.engine.shards import Shard


@dataclass(frozen=True)
class Inline:
    """Makes one shard after the other."""

    maker: ShardMaker
    description: str = "this process"
    elsewhere: bool = False

    def make(self, shards: Sequence[Shard]) -> Generator[Receipt, None, None]:
        """As `Workers.make`."""
        for shard in shards:
            yield self.maker.make(shard)
