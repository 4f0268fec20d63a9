"""The process itself as the only worker."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

from mergekit_ace.engine.driver import Site
from mergekit_ace.engine.receipt import Receipt
from mergekit_ace.engine.shard_maker import OnTensor, ShardMaker
from mergekit_ace.engine.shards import Shard


@dataclass(frozen=True)
class Inline:
    """Makes one shard after the other."""

    maker: ShardMaker
    description: str = "this process"
    elsewhere: bool = False

    def make(self, shards: Sequence[Shard]) -> Generator[Receipt, None, None]:
        """As `Workers.make`."""
        before = None
        for shard in shards:
            unfinished = self.maker.make(shard)
            if before is not None:
                yield before.receipt()
            before = unfinished
        if before is not None:
            yield before.receipt()


@contextlib.contextmanager
def inline(
    site: Site, memory: int | None = None, *, on_tensor: OnTensor = lambda name, seconds: None
) -> Iterator[Inline]:
    """This process as the worker of a merge; a file that it is finishing at the end of the block is finished.

    Args:
        site: where the merge is made.
        memory: as in `ShardMaker`.
        on_tensor: as in `ShardMaker`.
    """
    with ShardMaker(
        site.plan, site.work, site.folder, site.stage.receipts, memory=memory, on_tensor=on_tensor
    ) as maker:
        yield Inline(maker)
