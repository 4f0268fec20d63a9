"""Products that are symmetric by construction, computed without their redundant half."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

# With fewer columns a block the products are too thin for the matrix kernels: 192 were slower on two threads.
_SMALLEST_BLOCK = 256
_MOST_BLOCKS = 8


def _block_edges(size: int) -> list[int]:
    blocks = max(1, min(_MOST_BLOCKS, size // _SMALLEST_BLOCK))
    return [size * i // blocks for i in range(blocks + 1)]


def add_gram_upper_(target: Tensor, rows: Tensor, *, scale: float = 1.0, keep: float = 1.0) -> Tensor:
    """`target = keep * target + scale * rows^T rows`, upper block triangle only, in place.

    The lower half would be the transpose of the upper one: with `b` block columns, `(b + 1) / (2 b)` of the arithmetic
    of the full product is done. Call `mirror_upper_` once when all is added.

    Args:
        target: `[n, n]`; entries below the diagonal blocks are left as they are.
        rows: `[m, n]`, any strides, same dtype and device.
        scale: factor of the product.
        keep: factor of what `target` holds; 0 ignores it, NaN included.

    Returns:
        `target`.
    """
    edges = _block_edges(rows.shape[1])
    for start, stop in itertools.pairwise(edges):
        target[start:stop, start:].addmm_(rows[:, start:stop].T, rows[:, start:], beta=keep, alpha=scale)
    return target


def mirror_upper_(target: Tensor) -> Tensor:
    """Copy the upper triangle of `target` `[n, n]` onto the lower one, in place; diagonal blocks too."""
    edges = _block_edges(target.shape[0])
    for start, stop in itertools.pairwise(edges):
        diagonal = target[start:stop, start:stop]
        diagonal.copy_(diagonal.triu() + diagonal.triu(1).T)
        target[stop:, start:stop] = target[start:stop, stop:].T
    return target


def gram(rows: Tensor) -> Tensor:
    """`rows^T rows`, `[n, n]`, exactly symmetric, for `rows` `[m, n]`."""
    n = rows.shape[1]
    return mirror_upper_(add_gram_upper_(rows.new_empty((n, n)), rows, keep=0.0))


def add_to_diagonal_(target: Tensor, value: float) -> Tensor:
    """`target + value I` for `target` `[n, n]`, in place."""
    torch.diagonal(target).add_(value)
    return target
