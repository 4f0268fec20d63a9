"""Output tensors in files, and files in parts."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from pydantic import BaseModel

from mergekit_ace.engine.part import Part

_LARGEST = 5_000_000_000
_SMALLEST = 256_000_000
_FILES = 32


class OutputTensor(BaseModel, frozen=True, extra="forbid"):
    """One tensor of the merged model."""

    name: str
    dtype: str
    """As torch names it, such as `bfloat16`."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size."""
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return math.prod(self.shape) * dtype.itemsize


class Shard(BaseModel, frozen=True, extra="forbid"):
    """One file of the merged model: the unit of work."""

    file: str
    tensors: tuple[OutputTensor, ...]
    costs: tuple[float, ...]
    """Estimated reading and arithmetic of each tensor, in seconds of a machine of no particular kind."""
    reads: tuple[str, ...]
    """The checkpoint files that it is made from, as keys of the plan's `inputs`."""

    @property
    def cost(self) -> float:
        """Of all its tensors."""
        return sum(self.costs)

    @property
    def nbytes(self) -> int:
        """Size of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


def default_shard_size(total: int) -> int:
    """Bytes in a file unless they are given: about 32 files, of 256 MB to mergekit's 5 GB.

    It depends on the model alone, so that the number of workers changes no byte of the output.
    """
    return min(max(total // _FILES, _SMALLEST), _LARGEST)


def grouped(tensors: Sequence[OutputTensor], shard_size: int) -> list[tuple[OutputTensor, ...]]:
    """Fill one file after the other, as mergekit does: the next begins where a tensor would exceed `shard_size`."""
    groups: list[list[OutputTensor]] = []
    size = 0
    for tensor in tensors:
        if not groups or (groups[-1] and 0 < shard_size < size + tensor.nbytes):
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    return [tuple(group) for group in groups]


def file_names(count: int, *, safetensors: bool = True) -> list[str]:
    """Names of a model's files as transformers expects them."""
    stem, suffix = ("model", "safetensors") if safetensors else ("pytorch_model", "bin")
    if count == 1:
        return [f"{stem}.{suffix}"]
    return [f"{stem}-{place:05d}-of-{count:05d}.{suffix}" for place in range(1, count + 1)]


def arranged(
    tensors: Sequence[OutputTensor], shard_size: int, absent: Collection[str] = (), *, safetensors: bool = True
) -> dict[str, tuple[OutputTensor, ...]]:
    """The files of a whole model, in order, without the tensors that turned out not to be there."""
    groups = [
        present
        for group in grouped(tensors, shard_size)
        if (present := tuple(tensor for tensor in group if tensor.name not in absent))
    ]
    return dict(zip(file_names(len(groups), safetensors=safetensors), groups, strict=True))


def by_cost(shards: Sequence[Shard]) -> list[Shard]:
    """The dearest first, so that no worker begins a long one when the others are done."""
    return sorted(shards, key=lambda shard: (-shard.cost, shard.file))


def of_part(shards: Sequence[Shard], part: Part) -> list[Shard]:
    """One part's shards: dealt out by cost, the dearest first, each to the part that has least.

    Every shard is in one part; the costs of two parts differ by no more than the dearest shard.
    """
    loads = [0.0] * part.count
    chosen = []
    for shard in by_cost(shards):
        place = loads.index(min(loads))
        loads[place] += shard.cost
        if place == part.index - 1:
            chosen.append(shard)
    return sorted(chosen, key=lambda shard: shard.file)
