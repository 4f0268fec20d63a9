"""Matrices that stand for larger ones, by their coordinates in orthonormal bases of the rows and columns of all."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """What a matrix `D = U M V` has that its core `M` has not, `U` `[m, p]` and `V` `[q, n]` orthonormal.

    Products, norms and singular values of cores are those of the matrices. Sizes are not, and neither are sums over
    rows or columns, for which the columns of ones have coordinates of their own.

    Attributes:
        shape: `(m, n)`.
        ones_left: `U^T 1_m`, `[p]`, with `U U^T 1_m = 1_m`.
        ones_right: `V 1_n`, `[q]`.
    """

    shape: tuple[int, int]
    ones_left: Tensor
    ones_right: Tensor
