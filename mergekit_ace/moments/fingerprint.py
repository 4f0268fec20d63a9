"""Telling whether a weight is the one that something was measured on, whatever dtype it is read in."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel
from torch import Tensor

from mergekit_ace.linalg.blocks import blocks
from mergekit_ace.linalg.precision import squared_norm

# Far above the rounding of sums in float64, far below that of any stored dtype.
_SAME_NUMBERS = 1e-9
# Rounding errors are at most `eps / 2` of an entry and add up like a random walk: four of its deviations, and more.
_ROUNDED = 4.0
_MULTIPLIER = 2654435761  # Knuth's multiplicative hash: the golden ratio of 2^32


class Fingerprint(BaseModel, frozen=True, extra="forbid"):
    """A weight by a few numbers.

    Attributes:
        shape: `(m, n)` as stored.
        dtype: that its numbers were rounded to, by its name in torch.
        projection: `s_m^T W s_n` with fixed vectors `s` of signs.
        norm: `||W||_F`.
    """

    shape: tuple[int, ...]
    dtype: Literal["float64", "float32", "float16", "bfloat16"]
    projection: float
    norm: float

    def matches(self, read: Fingerprint) -> bool:
        """Whether `read` is of the same weight: to 1e-9 of the norm, or to rounding where its dtype is coarser."""
        if self.shape != read.shape:
            return False
        stored, given = getattr(torch, self.dtype), getattr(torch, read.dtype)
        exact = torch.promote_types(stored, given) == given
        tolerance = _SAME_NUMBERS if exact else _ROUNDED * torch.finfo(given).eps
        moved = max(abs(self.projection - read.projection), abs(self.norm - read.norm))
        return moved <= tolerance * max(self.norm, read.norm)


def fingerprint(weight: Tensor) -> Fingerprint:
    """The fingerprint of a weight.

    A change `E` moves the projection by about `||E||_F`, so that a fine-tune shows in any layer that it changed.

    Args:
        weight: `[m, n]`, of any floating dtype, finite.
    """
    right = _signs(weight.shape[1], weight.device)
    products = torch.cat([block.double() @ right for block in blocks(weight)])
    return Fingerprint(
        shape=tuple(weight.shape),
        dtype=str(weight.dtype).removeprefix("torch."),  # type: ignore[arg-type] # validated
        projection=float(_signs(weight.shape[0], weight.device) @ products),
        norm=squared_norm(weight) ** 0.5,
    )


def _signs(length: int, device: torch.device) -> Tensor:
    """A fixed vector of +1 and -1, float64."""
    hashed = torch.arange(1, length + 1, dtype=torch.int64, device=device) * _MULTIPLIER % 2**32
    hashed = (hashed ^ (hashed >> 15)) * _MULTIPLIER % 2**32
    return 1.0 - 2.0 * (hashed >> 31).double()
