"""Dominant singular subspaces of a matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mergekit_ace.linalg import bfloat16
from mergekit_ace.linalg.factors import Factors
from mergekit_ace.linalg.single_precision import estimated_vectors
from mergekit_ace.linalg.symmetric import gram

# The estimate of the error in float32 knows the gaps between eigenvalues as float32 has them: where two are closer than
# that at the cut, it is too small, by up to 8 on 30 spectra.
_CAUTION = 8.0
# Directions below this share of the largest singular value are rounding: their singular vectors are arbitrary, and a
# result that used them would differ from machine to machine.
_RANK_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


@dataclass(frozen=True, kw_only=True)
class SingularTriples:
    """The top singular triples of a matrix: as many as were asked for, or as its numerical rank has."""

    left: Tensor
    """`U_k`, `[m, k]`, orthonormal columns."""
    singular_values: Tensor
    """`[k]`, float64, descending, positive."""
    on_host: tuple[float, ...]
    """The same numbers. They decide how many there are, so the host has read them."""
    right: Tensor
    """`V_k`, `[n, k]`, orthonormal columns."""
    spectrum: Tensor
    """All singular values, `[min(m, n)]` float64, descending."""
    gram: Tensor | None = None
    """`F^T F` where `m >= n`, else `F F^T`, where it was formed and the caller keeps it."""


@dataclass(frozen=True, kw_only=True)
class DominantSubspace:
    """The top `k` singular triples of a matrix, as far as merging needs them."""

    singular_values: Tensor
    """`[k]` float64, descending; zero beyond the numerical rank; on the CPU."""
    partial_isometry: Tensor
    """`U_k V_k^T`, `[m, n]`, in the dtype of the input; directions beyond the numerical rank are left out."""
    triples: SingularTriples
    """What it is the product of."""
    estimated_error: float | None = None
    """Estimated `||.||_F` of the error of `mean(s_1..s_k) U_k V_k^T`, where float32 was enough; None: in float64."""
    products: str | None = None
    """Dtype of the factors of the products with the vectors, where that has fewer digits than the input."""


def singular_triples(matrix: Tensor, k: int, *, floor: float = 0.0) -> SingularTriples:
    """Top `k` singular triples of `matrix`, or fewer, the vectors in its dtype.

    float32: with `M = F F^T` (the smaller Gram side) and `M U = U diag(s^2)`, `V = F^T U diag(1/s)`. `M` and its
    eigendecomposition are float64: squaring halves the digits, and in float32 they left an error of several percent in
    the directions next to the cut on real layers. Six to eight times faster than a float32 SVD on a CPU.
    float64: the SVD itself, since no wider type is left to square into.

    Args:
        matrix: `[m, n]`, float32 or float64; unchanged.
        k: how many triples, `0 <= k <= min(m, n)`.
        floor: singular values up to it are rounding, whatever the largest one is.
    """
    triples = _precise_triples(matrix, k, floor)
    return replace(triples, left=triples.left.to(matrix.dtype), right=triples.right.to(matrix.dtype), gram=None)


def singular_triples_of_product(factors: Factors, k: int, *, floor: float = 0.0) -> SingularTriples:
    """Top `k` singular triples of a product of thin factors, or fewer, the vectors in their dtype.

    Of `left = Q_l R_l` and `right^T = Q_r R_r`, the singular values of `R_l R_r^T` and its vectors times `Q_l`, `Q_r`;
    in float64. `spectrum` is of as many as the smallest side of all three.

    Args:
        factors: `[m, r]` and `[r, n]`; unchanged.
        k: how many triples.
        floor: as in `singular_triples`.
    """
    of_left, of_right = torch.linalg.qr(factors.left.double()), torch.linalg.qr(factors.right.mT.double())
    left, singular_values, right = torch.linalg.svd(of_left.R @ of_right.R.mT, full_matrices=False)
    numbers = singular_values[: max(1, k)].tolist()
    least = max(floor, _RANK_TOLERANCE[factors.left.dtype] * numbers[0])
    on_host = tuple(number for number in numbers[:k] if number > least)
    kept = len(on_host)
    return SingularTriples(
        left=(of_left.Q @ left[:, :kept]).to(factors.left.dtype),
        singular_values=singular_values[:kept],
        on_host=on_host,
        right=(of_right.Q @ right[:kept].mT).to(factors.left.dtype),
        spectrum=singular_values,
    )


def dominant_subspace(matrix: Tensor, k: int, *, floor: float = 0.0, error: float = 0.0) -> DominantSubspace:
    """Top `k` singular values of `matrix` and the partial isometry `U_k V_k^T` of its singular vectors.

    How and in which precision: as `singular_triples`. The product of the vectors is taken in the dtype of the input:
    both have orthonormal columns, so nothing amplifies their rounding.

    With an allowed `error`, a float32 matrix goes through its Gram matrix in float32, and again in float64 where the
    estimate of `estimated_vectors` is not clearly below it. That is half the time on a CPU. The products with the
    vectors have factors in bfloat16 where that is faster and the rest of the error allows it.

    Args:
        matrix: `[m, n]`, float32 or float64; unchanged.
        k: how many directions, `0 <= k <= min(m, n)`.
        floor: singular values up to it are rounding, whatever the largest one is.
        error: largest `||.||_F` of the error of `mean(s_1..s_k) U_k V_k^T`.
    """
    found = None
    if error > 0 and k > 0 and matrix.dtype == torch.float32:
        found = _in_single_precision(matrix, k, floor, error)
    if found is None:
        triples = _precise_triples(matrix, k, floor)
        triples = replace(triples, left=triples.left.to(matrix.dtype), right=triples.right.to(matrix.dtype))
        found = DominantSubspace(
            singular_values=triples.singular_values,
            partial_isometry=triples.left @ triples.right.mT,
            triples=triples,
        )
    singular_values = torch.zeros(k, dtype=torch.float64, device="cpu")
    numbers = found.triples.on_host
    singular_values[: len(numbers)] = torch.tensor(numbers, dtype=torch.float64, device="cpu")
    return replace(found, singular_values=singular_values)


def isometry_error(spectrum: Tensor, k: int, shape: tuple[int, int], error: float) -> Tensor:
    """`||.||_F` of what an error of a matrix does to its partial isometry `U_k V_k^T`, to first order, float64.

    For an error of independent entries of variance `e^2`, whose entries in the bases of singular vectors then are too:

        e^2 (sum_{i <= k < j} 2 (s_i^2 + s_j^2) / (s_i^2 - s_j^2)^2 + sum_{i, j <= k} 2 / (s_i + s_j)^2
             + |m - n| sum_{i <= k} 1 / s_i^2)

    where no pair counts for more than an exchange of the two. Source: the derivative of singular vectors, as in
    Townsend, "Differentiating the singular value decomposition", 2016.

    Args:
        spectrum: all singular values, `[min(m, n)]`, descending, `s_k > 0`.
        k: how many directions.
        shape: `(m, n)`.
        error: `||.||_F` of the matrix's error.
    """
    m, n = shape
    variance = error**2 / (m * n)
    top, rest = spectrum[:k, None], spectrum[k:]
    apart = (top.square() - rest.square()).square()
    # `fmin` takes the number where the other is 0 / 0: of a tie and no error.
    exchanged = torch.fmin(2 * variance * (top.square() + rest.square()) / apart, spectrum.new_full((), 2.0))
    among = 2 * variance / (top + top.T).square()
    beside = abs(m - n) * variance / top.square()
    return (exchanged.sum() + among.clamp(max=2).sum() + beside.clamp(max=2).sum()).sqrt()


def polar_factor(matrix: Tensor) -> Tensor:
    """`U V^T` of `matrix = U diag(s) V^T`, `[m, n]`: the nearest matrix with orthonormal rows or columns.

    Directions beyond the numerical rank are left out. Args and precision: as `dominant_subspace`.
    """
    return dominant_subspace(matrix, min(matrix.shape)).partial_isometry


def rounding_floor(size: float, dtype: torch.dtype) -> float:
    """Largest singular value that counts as rounding in a difference of matrices of Frobenius norm `size`."""
    return _RANK_TOLERANCE[dtype] * size


def _in_single_precision(matrix: Tensor, k: int, floor: float, error: float) -> DominantSubspace | None:
    """In float32, with the estimated error; None where that is more than allowed."""
    flip = matrix.shape[0] >= matrix.shape[1]
    wide = matrix.mT if flip else matrix
    found = estimated_vectors(wide, k)
    least = max(floor, _RANK_TOLERANCE[matrix.dtype] * found.on_host[0])
    if _CAUTION * found.error > error or found.on_host[-1] <= least:
        return None
    # What is wrong with `V` is wrong with the isometry, which multiplies it by orthonormal vectors.
    level = math.fsum(found.on_host) / k
    allowed = math.sqrt((error**2 - (_CAUTION * found.error) ** 2) / 2) / level
    other, of_vectors = _product(wide.mT, found.left / found.singular_values.to(matrix.dtype), allowed)
    left, right = (other, found.left) if flip else (found.left, other)
    isometry, of_isometry = _product(left, right.mT, allowed)
    triples = SingularTriples(
        left=left,
        singular_values=found.singular_values,
        on_host=found.on_host,
        right=right,
        spectrum=found.spectrum,
        gram=found.gram,
    )
    return DominantSubspace(
        singular_values=found.singular_values,
        partial_isometry=isometry,
        triples=triples,
        estimated_error=math.hypot(found.error, level * of_vectors, level * of_isometry),
        products="bfloat16" if of_vectors > 0 or of_isometry > 0 else None,
    )


def _product(left: Tensor, right: Tensor, allowed: float) -> tuple[Tensor, float]:
    """`left @ right` and its estimated error, `||.||_F`: with factors in bfloat16 where that is within `allowed`."""
    if bfloat16.is_faster(left.device, *left.shape, right.shape[1]):
        rough, error = bfloat16.product_within(left, right, allowed)
        if rough is not None:
            return rough.to(left.dtype), error
    return left @ right, 0.0


def _precise_triples(matrix: Tensor, k: int, floor: float) -> SingularTriples:
    """The triples in float64 throughout."""
    flip = matrix.shape[0] >= matrix.shape[1]
    precise = (matrix.mT if flip else matrix).double()
    of_rows = None
    if matrix.dtype == torch.float64:
        left, singular_values, right = torch.linalg.svd(precise, full_matrices=False)
    else:
        of_rows = gram(precise.mT)
        eigenvalues, vectors = torch.linalg.eigh(of_rows)
        left, singular_values, right = vectors.flip(1), eigenvalues.flip(0).clamp(min=0).sqrt(), None
    numbers = singular_values[: max(1, k)].tolist()
    least = max(floor, _RANK_TOLERANCE[matrix.dtype] * numbers[0]) if numbers else floor
    on_host = tuple(number for number in numbers[:k] if number > least)
    k = len(on_host)
    spectrum, left, singular_values = singular_values, left[:, :k], singular_values[:k]
    right = (precise.mT @ left) / singular_values if right is None else right[:k].mT
    if flip:
        left, right = right, left
    return SingularTriples(
        left=left, singular_values=singular_values, on_host=on_host, right=right, spectrum=spectrum, gram=of_rows
    )
