"""Random numbers that are the same on every device, in every thread and in every run."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_SEED = 0
# As many as a sketch takes at the most, so that all uses of one number of rows share one draw.
_COLUMNS = 136


def normal_numbers(rows: int, columns: int, *, like: Tensor) -> Tensor:
    """`[rows, columns]` independent standard normal numbers of a fixed seed, in the dtype and on the device of `like`.

    Drawn on the CPU, because generators of different devices give different numbers. The device is named because
    mergekit's multi-GPU worker runs within `with torch.device(...)`: a factory call without a device would make its
    tensor there, and a generator of the CPU cannot fill it.
    """
    return _drawn(rows, max(columns, min(rows, _COLUMNS)), like.dtype, like.device)[:, :columns]


# The matrices of a model have few shapes: drawing and moving these numbers for each costs more than the products.
@functools.lru_cache(maxsize=8)
def _drawn(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(_SEED)
    drawn = torch.randn((rows, columns), generator=generator, dtype=dtype, device="cpu")
    return drawn.to(device)
