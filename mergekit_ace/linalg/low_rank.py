"""Low rank, found by a randomized range finder and verified, never assumed."""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_ace.linalg.draws import normal_numbers
from mergekit_ace.linalg.precision import squared_norm
from mergekit_ace.linalg.symmetric import gram

_OVERSAMPLING = 8
# Where this share of the energy is missed, it is far from any rounding level: no need to look closer.
_CLEARLY_FULL_RANK = 1e-4


def orthonormal_factors(matrix: Tensor, *, most: int, tolerance: float) -> tuple[Tensor, Tensor] | None:
    """`matrix = U Y` with orthonormal columns in `U`, when its numerical rank is at most `most`.

    Halko, Martinsson, Tropp, "Finding structure with randomness", SIAM Review 53(2), 2011, Algorithm 4.1, with a fixed
    seed, so that the same matrix gives the same factors. The residual is formed and measured. A few rows say at small
    cost that a matrix is of full rank.

    Args:
        matrix: `[m, n]`; overwritten.
        most: largest rank that is of use.
        tolerance: largest `||matrix - U Y||_F` that counts as rounding.

    Returns:
        `U` `[m, r]` and `Y` `[r, n]`, or None when no `r <= most` reaches the tolerance.
    """
    m, n = matrix.shape
    width = most + _OVERSAMPLING
    if width >= min(m, n):
        return None
    if _corner_is_full(matrix[: 2 * width], most):
        return None
    total = squared_norm(matrix)
    probe = normal_numbers(n, width, like=matrix)
    basis: Tensor = torch.linalg.qr(matrix @ probe).Q
    rows = basis.mT @ matrix
    if total - squared_norm(rows) > _CLEARLY_FULL_RANK * total:
        return None
    eigenvalues, vectors = torch.linalg.eigh(gram(rows.mT.double()))
    kept = eigenvalues.flip(0).clamp(min=0).sqrt() > tolerance / width**0.5
    rank = int(kept.sum())
    if rank > most:
        return None
    turn = vectors.flip(1)[:, :rank].to(matrix.dtype)
    basis = basis @ turn
    rows = turn.mT @ rows
    residual = matrix.addmm_(basis, rows, alpha=-1)
    return (basis, rows) if squared_norm(residual) <= tolerance**2 else None


def captured_energy(matrix: Tensor, directions: int) -> float:
    """Share of `||matrix||_F^2` in its top `directions` singular directions, in `[0, 1]`; 1 for a zero matrix.

    The energy of the top directions of `Q^T X`, with `Q` the range of `X X^T X` times random columns of a fixed seed,
    a few more than asked for: within a percent of the exact share on flat spectra, exact to rounding where the rank is
    no larger. Source: as `orthonormal_factors`, Algorithm 4.4 with one step.

    Args:
        matrix: `[m, n]`, unchanged.
        directions: at least 1.
    """
    total = squared_norm(matrix)
    width = directions + _OVERSAMPLING
    if total == 0 or width >= min(matrix.shape):
        return 1.0 if total == 0 or directions >= min(matrix.shape) else _exact_share(matrix, directions)
    probe = normal_numbers(matrix.shape[1], width, like=matrix)
    basis: Tensor = torch.linalg.qr(matrix @ probe).Q
    basis = torch.linalg.qr(matrix @ (matrix.mT @ basis)).Q
    energies = torch.linalg.eigvalsh(gram((basis.mT @ matrix).mT).double())
    return min(1.0, float(energies[-directions:].clamp(min=0).sum()) / total)


def _exact_share(matrix: Tensor, directions: int) -> float:
    smaller = gram(matrix if matrix.shape[0] > matrix.shape[1] else matrix.mT).double()
    energies = torch.linalg.eigvalsh(smaller).clamp(min=0)
    return min(1.0, float(energies[-directions:].sum() / energies.sum()))


def _corner_is_full(rows: Tensor, most: int) -> bool:
    """Whether some rows alone hold clearly more than `most` directions; `[2 w, n]`, so `O(w^2 n)` of arithmetic."""
    eigenvalues = torch.linalg.eigvalsh(gram(rows.mT).double()).clamp(min=0)
    return bool(eigenvalues[:-most].sum() > _CLEARLY_FULL_RANK * eigenvalues.sum())
