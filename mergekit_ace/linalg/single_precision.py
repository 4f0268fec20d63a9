"""Eigenvectors in float32, with an estimate of what their rounding does to a partial isometry."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_ace.linalg.random_draws import normal_numbers
from mergekit_ace.linalg.symmetric import gram

# The estimate has a deviation of a few percent with so many; each costs a product with one vector.
_PROBES = 8


@dataclass(frozen=True, kw_only=True)
class EstimatedVectors:
    """The top `k` left singular vectors of a matrix, in float32."""

    left: Tensor
    """`U_k`, `[p, k]`."""
    singular_values: Tensor
    """`[k]` float64, descending."""
    on_host: tuple[float, ...]
    """The same numbers."""
    spectrum: Tensor
    """All singular values, `[p]` float64, descending."""
    gram: Tensor
    """`F F^T`, `[p, p]`."""
    error: float
    """Estimated `||.||_F` of the error of `mean(s_1..s_k) U_k V_k^T`; infinite where nothing is known of it."""


def estimated_vectors(matrix: Tensor, k: int) -> EstimatedVectors:
    """Top left singular vectors of a float32 matrix by its Gram matrix in float32, and how far to trust them.

    The computed `U diag(l) U^T` is the eigendecomposition of `F F^T + E`. With entries of `E` in the basis of the
    eigenvectors of a mean square `e^2`, to first order the partial isometry `Z = U_k diag(1/s) U_k^T F` moves by

        ||dZ||_F^2 = e^2 (sum_{i <= k < j} (1 + l_j / l_i) / (l_i - l_j)^2 + sum_{i, j <= k} 1 / (s_i (s_i + s_j))^2)

    (Daleckii and Krein's formula for the function that is `l^-1/2` above the cut and 0 below). A pair of directions
    that rounding exchanges counts as one exchanged in full. `||E||_F^2 = p^2 e^2` is measured with a few random vectors
    `y` of a fixed seed, as the mean of `||U diag(l) U^T y - F (F^T y)||^2`.

    Args:
        matrix: `F`, `[p, q]`, float32, `p <= q`.
        k: `1 <= k <= p`.
    """
    p = matrix.shape[0]
    of_rows = gram(matrix.mT)
    eigenvalues, vectors = torch.linalg.eigh(of_rows)
    probes = normal_numbers(p, _PROBES, like=matrix)
    deviation = vectors @ (eigenvalues[:, None] * (vectors.mT @ probes)) - matrix @ (matrix.mT @ probes)
    squares = deviation.double().square().sum() / (_PROBES * p * p)
    spectrum = eigenvalues.flip(0).double()
    values = spectrum[:k].clamp(min=0).sqrt()
    moved = (squares * _sensitivity(spectrum[:k], values)).clamp(max=k) + _exchanged(spectrum, k, squares)
    error, smallest, *numbers = torch.cat([moved.sqrt()[None] * values.mean(), spectrum[k - 1 : k], values]).tolist()
    trusted = smallest > 0 and math.isfinite(error)
    return EstimatedVectors(
        left=vectors.flip(1)[:, :k],
        singular_values=values,
        on_host=tuple(numbers),
        spectrum=spectrum.clamp(min=0).sqrt(),
        gram=of_rows,
        error=error if trusted else math.inf,
    )


def _sensitivity(eigenvalues: Tensor, values: Tensor) -> Tensor:
    """Of the isometry within its own directions."""
    return (1 / (eigenvalues[:, None] * (values[:, None] + values).square())).sum()


def _exchanged(spectrum: Tensor, k: int, squares: Tensor) -> Tensor:
    """What the directions above the cut take from those below it, and the reverse."""
    above, below = spectrum[:k, None], spectrum[k:].clamp(min=0)
    # `fmin` takes the number where the other is 0 / 0: of a tie and no error.
    moved = torch.fmin(squares / (above - below).square(), spectrum.new_full((), 1.0))
    return (moved * (1 + below / above)).sum()
