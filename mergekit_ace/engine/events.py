"""What happens during a merge, for those who watch it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from mergekit_ace.engine.plan import MergePlan
from mergekit_ace.engine.receipt import Notice, Receipt
from mergekit_ace.engine.shards import Shard


@dataclass(frozen=True)
class Planned:
    """The merge is planned; these shards are to be made, those are there."""

    plan: MergePlan
    todo: tuple[Shard, ...]
    taken: tuple[Receipt, ...]
    workers: str
    """Who makes them, in words."""
    elsewhere: bool
    """Whether they are other processes, whose log is not this one's."""


@dataclass(frozen=True)
class TensorMade:
    """A worker has merged a tensor."""

    name: str
    seconds: float


@dataclass(frozen=True)
class ShardMade:
    """A shard is written."""

    receipt: Receipt


@dataclass(frozen=True)
class Noted:
    """Something worth knowing that is no warning, such as that an adapter is taken from the cache."""

    text: str


@dataclass(frozen=True)
class Warned:
    """A warning, the first of its cause."""

    notice: Notice


Event = Planned | TensorMade | ShardMade | Noted | Warned


class Watcher(Protocol):
    """Is told what happens."""

    def __call__(self, event: Event) -> None:
        """Take note of an event."""
