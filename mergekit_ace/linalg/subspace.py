"""Dominant singular subspaces of a matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_ace.linalg.symmetric import gram

# Directions below this share of the largest singular value are rounding: their singular vectors are arbitrary, and a
# result that used them would differ from machine to machine.
_RANK_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


@dataclass(frozen=True, kw_only=True)
class DominantSubspace:
    """The top `k` singular triples of a matrix, as far as merging needs them."""

    singular_values: Tensor
    """`[k]` float64, descending; zero beyond the numerical rank."""
    partial_isometry: Tensor
    """`U_k V_k^T`, `[m, n]`, in the dtype of the input; directions beyond the numerical rank are left out."""


def dominant_subspace(matrix: Tensor, k: int) -> DominantSubspace:
    """Top `k` singular values of `matrix` and the partial isometry `U_k V_k^T` of its singular vectors.

    float32: with `M = F F^T` (the smaller Gram side) and `M U = U diag(s^2)`, `U_k V_k^T = U_k diag(1/s) U_k^T F`.
    `M` and its eigendecomposition are float64: squaring halves the digits, and in float32 they left an error of several
    percent in the directions next to the cut on real layers. Six to eight times faster than a float32 SVD on a CPU.
    float64: the SVD itself, since no wider type is left to square into.

    Args:
        matrix: `[m, n]`, float32 or float64; unchanged.
        k: how many directions, `0 <= k <= min(m, n)`.
    """
    if matrix.shape[0] > matrix.shape[1]:
        flipped = dominant_subspace(matrix.mT, k)
        return DominantSubspace(
            singular_values=flipped.singular_values, partial_isometry=flipped.partial_isometry.mT.contiguous()
        )
    if k == 0:
        return DominantSubspace(
            singular_values=matrix.new_zeros(0, dtype=torch.float64), partial_isometry=torch.zeros_like(matrix)
        )
    tolerance = _RANK_TOLERANCE[matrix.dtype]
    if matrix.dtype == torch.float64:
        left, singular_values, right = torch.linalg.svd(matrix, full_matrices=False)
        singular_values = singular_values[:k]
        real = singular_values > tolerance * singular_values[0]
        isometry = (left[:, :k] * real) @ right[:k]
        return DominantSubspace(singular_values=singular_values * real, partial_isometry=isometry)
    precise = matrix.double()
    eigenvalues, vectors = torch.linalg.eigh(gram(precise.mT))
    singular_values = eigenvalues.flip(0)[:k].clamp(min=0).sqrt()
    vectors = vectors.flip(1)[:, :k]
    real = singular_values > tolerance * singular_values[0]
    inverse = torch.where(real, 1.0 / torch.where(real, singular_values, 1.0), 0.0)
    isometry = (vectors * inverse) @ (vectors.mT @ precise)
    return DominantSubspace(singular_values=singular_values * real, partial_isometry=isometry.to(matrix.dtype))
