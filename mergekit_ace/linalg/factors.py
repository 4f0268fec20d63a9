"""A matrix of low rank as the product of two thin factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Factors:
    """`D = left @ right`, everything that scales it included.

    Attributes:
        left: `[m, r]`, or `[E, m, r]`; float32 or float64.
        right: `[r, n]`, or `[E, r, n]`, same dtype.
    """

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """`(m, n)`."""
        return int(self.left.shape[-2]), int(self.right.shape[-1])

    @property
    def rank(self) -> int:
        """`r`: columns of `left`."""
        return int(self.left.shape[-1])

    @property
    def transposed(self) -> Factors:
        """`D^T`, of the same storage."""
        return Factors(left=self.right.mT, right=self.left.mT)

    def is_copy_of(self, other: Factors) -> bool:
        """Whether both factors are equal, bit by bit."""
        return (
            self.left.shape == other.left.shape
            and torch.equal(self.left, other.left)
            and torch.equal(self.right, other.right)
        )

    def matrix(self) -> Tensor:
        """`D`, in storage of its own."""
        return self.left @ self.right

    def rows(self, rows: slice) -> Tensor:
        """Some rows of `D`, `[rows, n]`."""
        return self.left[rows] @ self.right

    def small_grams(self) -> tuple[Tensor, Tensor]:
        """`left^T left` and `right right^T`, `[r, r]` float64.

        `||D||_F^2` is the inner product of the two, and traces of more products of `D` and `D^T` follow likewise.
        """
        left, right = self.left.double(), self.right.double()
        return left.mT @ left, right @ right.mT


def weighted_sum(terms: Sequence[Factors], weights: Sequence[float]) -> Tensor:
    """`sum_t w_t D_t`, `[m, n]`, without a `D_t` of its own.

    Args:
        terms: at least one, all `[m, n]`, of one dtype and device.
        weights: `w_t`.
    """
    total = terms[0].left.new_zeros(terms[0].shape)
    for term, weight in zip(terms, weights, strict=True):
        total.addmm_(term.left, term.right, alpha=weight)
    return total
