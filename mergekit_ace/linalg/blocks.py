"""Tensors in pieces, for passes that need a copy in another precision but no buffer of the whole size."""

from __future__ import annotations

import torch
from torch import Tensor

# On a CPU a block and its float64 copy stay in the cache, which makes a pass several times faster than one reduction of
# it all.
_ON_THE_CPU = 1 << 17
LARGEST_BLOCK = 1 << 24
"""Elements of a block on an accelerator.

Each kernel of a pass then moves at least 32 MB, which takes a device of 3 TB/s ten microseconds, more than its launch;
and the float64 copy is 128 MB. The embedding table of a 70B model, 1e9 elements, is 63 blocks.
"""


# Rows of a product are enough for the matrix kernels, and few of its buffers fit beside the tensors themselves.
_OF_A_PRODUCT = 1 << 26


def row_slices(m: int, n: int, *, most: int | None = None) -> list[slice]:
    """The rows of an `[m, n]` matrix in pieces of at most 2^26 elements, or `most`, for products that go row by row.

    One piece but for embedding tables and the matrices of the largest models.
    """
    rows: int = max(1, (_OF_A_PRODUCT if most is None else most) // max(1, n))
    return [slice(start, min(start + rows, m)) for start in range(0, m, rows)]


def blocks(tensor: Tensor) -> tuple[Tensor, ...]:
    """`tensor` in pieces of limited size, views that may be written to.

    It is cut along its first axis, so that a matrix gives whole rows; what has more axes, or rows longer than
    `LARGEST_BLOCK`, is cut further. A block of a matrix is thus one row at the least. Two tensors of one shape and
    device are cut at the same places.
    """
    most = _ON_THE_CPU if tensor.device.type == "cpu" else LARGEST_BLOCK
    if tensor.ndim == 0 or tensor.numel() <= most:
        return (tensor,)
    row = tensor[0].numel()
    if row > most and (tensor.ndim > 2 or row > LARGEST_BLOCK):
        return tuple(block for part in tensor for block in blocks(part))
    return tuple(torch.split(tensor, max(1, most // row)))


# On a CPU, 16 MB of float32: the C library maps buffers of more than 32 MB anew each time, and the first writing to
# them takes several times as long as the arithmetic of a pass. Fewer rows would make products with them slower.
_PANEL, _FEWEST_ROWS = 1 << 22, 1024


def panels(matrix: Tensor) -> list[slice]:
    """The rows of a matrix in pieces for products: few of them, and small enough for a CPU to use one buffer again.

    On an accelerator `row_slices`, and no more than these anywhere.
    """
    m, n = matrix.shape
    most = _OF_A_PRODUCT if matrix.device.type != "cpu" else min(_OF_A_PRODUCT, max(_PANEL, _FEWEST_ROWS * n))
    return row_slices(m, n, most=most)
