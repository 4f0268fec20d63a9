"""Products that are symmetric by construction, computed without their redundant half."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Thinner products waste the matrix kernels of a CPU; an accelerator wants few and large ones.
_SMALLEST_BLOCK = 192
_MOST_BLOCKS_ON_AN_ACCELERATOR = 4


def _upper_blocks(start: int, stop: int, smallest: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of the blocks on and above the diagonal, by halves, so that most of them are square."""
    if stop - start < 2 * smallest:
        yield slice(start, stop), slice(start, stop)
        return
    middle = (start + stop) // 2
    yield slice(start, middle), slice(middle, stop)
    yield from _upper_blocks(start, middle, smallest)
    yield from _upper_blocks(middle, stop, smallest)


def _blocks_of(target: Tensor) -> Iterator[tuple[slice, slice]]:
    size = target.shape[0]
    few = 1 if target.device.type == "cpu" else size // _MOST_BLOCKS_ON_AN_ACCELERATOR
    return _upper_blocks(0, size, max(_SMALLEST_BLOCK, few))


def add_gram_upper_(target: Tensor, rows: Tensor, *, scale: float = 1.0, keep: float = 1.0) -> Tensor:
    """`target = keep * target + scale * rows^T rows`, upper block triangle only, in place.

    The lower half would be the transpose of the upper one: with `b` blocks on the diagonal, `(b + 1) / (2 b)` of the
    arithmetic of the full product is done. Call `mirror_upper_` once when all is added.

    Args:
        target: `[n, n]`; entries below the diagonal blocks are left as they are.
        rows: `[m, n]`, any strides, same dtype and device.
        scale: factor of the product.
        keep: factor of what `target` holds; 0 ignores it, NaN included.

    Returns:
        `target`.
    """
    for above, beside in _blocks_of(target):
        target[above, beside].addmm_(rows[:, above].T, rows[:, beside], beta=keep, alpha=scale)
    return target


def mirror_upper_(target: Tensor) -> Tensor:
    """Copy the upper triangle of `target` `[n, n]` onto the lower one, in place; diagonal blocks too."""
    for above, beside in _blocks_of(target):
        block = target[above, beside]
        if above == beside:
            block.copy_(block.triu() + block.triu(1).T)
        else:
            target[beside, above] = block.T
    return target


def gram(rows: Tensor) -> Tensor:
    """`rows^T rows`, `[n, n]`, exactly symmetric, for `rows` `[m, n]`."""
    n = rows.shape[1]
    return mirror_upper_(add_gram_upper_(rows.new_empty((n, n)), rows, keep=0.0))


def add_to_diagonal_(target: Tensor, value: float) -> Tensor:
    """`target + value I` for `target` `[n, n]`, in place."""
    torch.diagonal(target).add_(value)
    return target
