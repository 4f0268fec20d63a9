"""A few tensors that stand for a model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol, TypeVar

from mergekit_ace.report.naming import place


class Named(Protocol):
    """Anything with a tensor's name."""

    @property
    def name(self) -> str:
        """As in the merged model."""
        ...


_Tensor = TypeVar("_Tensor", bound=Named)


def sample(tensors: Sequence[_Tensor], count: int) -> list[_Tensor]:
    """`count` tensors of every layer type, evenly spaced over the depth, in the order of the model.

    The same names give the same sample. One of a type is the middle one; two or more include the first and the last.

    Args:
        tensors: in the order of the model.
        count: at least 1.
    """
    by_kind: dict[str, list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        by_kind[place(tensor.name).kind].append(index)
    chosen: set[int] = set()
    for indices in by_kind.values():
        last = len(indices) - 1
        steps = min(count, len(indices)) - 1
        chosen.update(indices[round(last * i / steps) if steps else last // 2] for i in range(steps + 1))
    return [tensors[index] for index in sorted(chosen)]
