"""Tensors in pieces, for passes that need a copy in another precision but no buffer of the whole size."""

from __future__ import annotations

import torch
from torch import Tensor

# A block and its float64 copy stay in the cache, which makes a pass several times faster than one reduction of it all.
_AT_ONCE = 1 << 17


def blocks(tensor: Tensor) -> tuple[Tensor, ...]:
    """`tensor` in pieces along its first axis, views that may be written to; whole on an accelerator.

    Two tensors of one shape and device are cut at the same places.
    """
    if tensor.ndim == 0 or tensor.numel() == 0 or tensor.device.type != "cpu":
        return (tensor,)
    return tuple(torch.split(tensor, max(1, _AT_ONCE // tensor[:1].numel())))
