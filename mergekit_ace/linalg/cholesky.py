"""Symmetric positive definite systems, by Cholesky and never by a general inverse."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from mergekit_ace.linalg.symmetric import add_gram_upper_

# On a CPU torch first copies a triangle to a column-major buffer row by row, which takes half of the time for a large
# matrix and hardly any for one of this side.
_LARGEST_BLOCK = 512
# Jitter relative to the mean diagonal; each step is ten times the one before.
_FIRST_JITTER = 10.0
_MOST_ATTEMPTS = 5


class FactorizationError(RuntimeError):
    """No jitter within reason makes a matrix positive definite."""


def cholesky_factor(matrix: Tensor, *, what: str) -> Tensor:
    """Lower Cholesky factor `L` with `L L^T = matrix`, adding an escalating jitter when rounding made it indefinite.

    Args:
        matrix: `[n, n]` symmetric; left unchanged.
        what: name of the system, for messages.

    Returns:
        `[n, n]`, lower triangular, same dtype and device. A CPU holds a quarter of its size beside it meanwhile.

    Raises:
        FactorizationError: when the matrix is not finite, or not positive definite even with the largest jitter.
    """
    factor = _factorized(matrix)
    if factor is not None:
        return factor
    level = float(torch.diagonal(matrix).abs().mean())
    if not math.isfinite(level):
        raise FactorizationError(
            f"{what}: a {tuple(matrix.shape)} system must be finite to be solved; got NaN or infinity"
        )
    eps = torch.finfo(matrix.dtype).eps
    for attempt in range(_MOST_ATTEMPTS):
        jitter = level * eps * _FIRST_JITTER ** (attempt + 1)
        shifted = matrix.clone()
        torch.diagonal(shifted).add_(jitter)
        factor = _factorized(shifted)
        if factor is not None:
            warnings.warn(
                f"{what}: not positive definite in {matrix.dtype}; {jitter:.1e} was added to its diagonal "
                f"(mean {level:.1e}). A larger epsilon avoids this.",
                RuntimeWarning,
                stacklevel=2,
            )
            return factor
    raise FactorizationError(
        f"{what}: a {tuple(matrix.shape)} system must be positive definite; it is not, even with {jitter:.1e} on its "
        f"diagonal (mean {level:.1e}). Raise epsilon."
    )


def _factorized(matrix: Tensor) -> Tensor | None:
    """The lower factor, in storage of its own; None where the matrix is not positive definite."""
    if matrix.device.type != "cpu" or len(matrix) <= _LARGEST_BLOCK:
        factor: Tensor
        factor, info = torch.linalg.cholesky_ex(matrix)
        return None if int(info) else factor
    upper = matrix.clone(memory_format=torch.contiguous_format)
    return upper.triu_().mT if _factorize_(upper) else None


def _factorize_(matrix: Tensor) -> bool:
    """Put `U` with `U^T U = matrix` into the upper triangle, by halves; False: it is not positive definite.

    Of `[[A, B], [B^T, C]]`: the factor of `A`, `U_A^-T B`, and the factor of `C - (U_A^-T B)^T (U_A^-T B)`.
    """
    if len(matrix) <= _LARGEST_BLOCK:
        factor, info = torch.linalg.cholesky_ex(matrix, upper=True)
        matrix.copy_(factor)
        return not int(info)
    half = len(matrix) // 2
    above, beside = matrix[:half, :half], matrix[:half, half:]
    if not _factorize_(above):
        return False
    # Transposed, `beside` has the columns that LAPACK wants.
    beside.mT.copy_(torch.linalg.solve_triangular(above, beside.mT, upper=True, left=False))
    return _factorize_(add_gram_upper_(matrix[half:, half:], beside, scale=-1))


def solve_right(rows: Tensor, factor: Tensor) -> Tensor:
    """`rows (L L^T)^-1` by two triangular solves from the right, without transposing `rows`.

    Args:
        rows: `[m, n]`.
        factor: lower Cholesky factor `L`, `[n, n]`.

    Returns:
        `[m, n]`.
    """
    half: Tensor = torch.linalg.solve_triangular(factor.mT, rows, upper=True, left=False)
    whole: Tensor = torch.linalg.solve_triangular(factor, half, upper=False, left=False)
    return whole
