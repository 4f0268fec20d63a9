"""Symmetric positive definite systems, by Cholesky and never by a general inverse."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

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
        `[n, n]`, lower triangular, same dtype and device.

    Raises:
        FactorizationError: when the matrix is not finite, or not positive definite even with the largest jitter.
    """
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    if not int(info):
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
        factor, info = torch.linalg.cholesky_ex(shifted)
        if not int(info):
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
