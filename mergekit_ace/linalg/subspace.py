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
class SingularTriples:
    """The top `k` singular triples of a matrix. Beyond its numerical rank all three are zero."""

    left: Tensor
    """`U_k`, `[m, k]`, orthonormal columns (or zero ones)."""
    singular_values: Tensor
    """`[k]`, float64, descending."""
    right: Tensor
    """`V_k`, `[n, k]`, orthonormal columns (or zero ones)."""


@dataclass(frozen=True, kw_only=True)
class DominantSubspace:
    """The top `k` singular triples of a matrix, as far as merging needs them."""

    singular_values: Tensor
    """`[k]` float64, descending; zero beyond the numerical rank."""
    partial_isometry: Tensor
    """`U_k V_k^T`, `[m, n]`, in the dtype of the input; directions beyond the numerical rank are left out."""


def singular_triples(matrix: Tensor, k: int, *, scale: float = 0.0) -> SingularTriples:
    """Top `k` singular triples of `matrix`, the vectors in its dtype.

    float32: with `M = F F^T` (the smaller Gram side) and `M U = U diag(s^2)`, `V = F^T U diag(1/s)`. `M` and its
    eigendecomposition are float64: squaring halves the digits, and in float32 they left an error of several percent in
    the directions next to the cut on real layers. Six to eight times faster than a float32 SVD on a CPU.
    float64: the SVD itself, since no wider type is left to square into.

    Args:
        matrix: `[m, n]`, float32 or float64; unchanged.
        k: how many triples, `0 <= k <= min(m, n)`.
        scale: size of what `matrix` is a difference of, where that may be larger than what is left of it: the numerical
            rank counts the singular values that stand out of the rounding at this size.
    """
    triples = _precise_triples(matrix, k, scale)
    return SingularTriples(
        left=triples.left.to(matrix.dtype),
        singular_values=triples.singular_values,
        right=triples.right.to(matrix.dtype),
    )


def dominant_subspace(matrix: Tensor, k: int) -> DominantSubspace:
    """Top `k` singular values of `matrix` and the partial isometry `U_k V_k^T` of its singular vectors.

    How, and in which precision: as `singular_triples`, rounded once at the end.

    Args:
        matrix: `[m, n]`, float32 or float64; unchanged.
        k: how many directions, `0 <= k <= min(m, n)`.
    """
    triples = _precise_triples(matrix, k)
    isometry = triples.left @ triples.right.mT
    return DominantSubspace(singular_values=triples.singular_values, partial_isometry=isometry.to(matrix.dtype))


def polar_factor(matrix: Tensor) -> Tensor:
    """`U V^T` of `matrix = U diag(s) V^T`, `[m, n]`: the nearest matrix with orthonormal rows or columns.

    Directions beyond the numerical rank are left out. Args and precision: as `dominant_subspace`.
    """
    return dominant_subspace(matrix, min(matrix.shape)).partial_isometry


def _precise_triples(matrix: Tensor, k: int, scale: float = 0.0) -> SingularTriples:
    """The triples in float64 throughout."""
    if matrix.shape[0] > matrix.shape[1]:
        flipped = _precise_triples(matrix.mT, k, scale)
        return SingularTriples(left=flipped.right, singular_values=flipped.singular_values, right=flipped.left)
    tolerance = _RANK_TOLERANCE[matrix.dtype]
    if matrix.dtype == torch.float64:
        left, singular_values, right = torch.linalg.svd(matrix, full_matrices=False)
        left, singular_values, right = left[:, :k], singular_values[:k], right[:k].mT
        real = singular_values > tolerance * singular_values[:1].clamp(min=scale)
        return SingularTriples(left=left * real, singular_values=singular_values * real, right=right * real)
    precise = matrix.double()
    eigenvalues, vectors = torch.linalg.eigh(gram(precise.mT))
    singular_values = eigenvalues.flip(0)[:k].clamp(min=0).sqrt()
    real = singular_values > tolerance * singular_values[:1].clamp(min=scale)
    left = vectors.flip(1)[:, :k] * real
    inverse = torch.where(real, 1.0 / torch.where(real, singular_values, 1.0), 0.0)
    return SingularTriples(left=left, singular_values=singular_values * real, right=(precise.mT @ left) * inverse)
