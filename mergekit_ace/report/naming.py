"""Where a tensor stands in its model, read off its name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

_NUMBER = re.compile(r"(?:^|(?<=\.))\d+(?=\.|$)")
_SLICE = re.compile(r"\[\d+\]$")


class Place(NamedTuple):
    """Number of the layer, None outside the layers; and the layer type."""

    depth: int | None
    kind: str


def place(name: str) -> Place:
    """Split `model.layers.3.mlp.experts.7.down_proj.weight` into depth 3 and type `mlp.experts.*.down_proj`.

    The first number is the layer's. Later ones, and the slice of a stack (`name[7]`), belong to experts or blocks, and
    tensors that differ only there are of one type.
    """
    stem = _SLICE.sub("", name)
    stem = stem.removesuffix(".weight")
    first = _NUMBER.search(stem)
    if first is None:
        return Place(None, stem)
    rest = stem[first.end() + 1 :]
    return Place(int(first.group()), _NUMBER.sub("*", rest) or stem)


def from_layer(name: str) -> str:
    """The name from its layer's number on, without `.weight`: enough in a table."""
    first = _NUMBER.search(name)
    return (name if first is None else name[first.start() :]).removesuffix(".weight")


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Each model's path, cut to the shortest tail that tells it from the others: `/models/llama/math` is `math`.

    Of a LoRA expert `base+adapter`, the adapter's.
    """
    tails = {name: name.rsplit("+", 1)[-1].rstrip("/").split("/") for name in names}
    for length in range(1, max((len(parts) for parts in tails.values()), default=0) + 1):
        short = {name: "/".join(parts[-length:]) for name, parts in tails.items()}
        if len(set(short.values())) == len(short):
            return short
    return {name: name for name in names}
