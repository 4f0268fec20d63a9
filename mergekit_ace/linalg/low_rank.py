"""Low rank, found by a randomized range finder and verified, never assumed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from mergekit_ace.linalg.precision import squared_norm, squared_norms
from mergekit_ace.linalg.random_draws import normal_numbers
from mergekit_ace.linalg.symmetric import gram

_OVERSAMPLING = 8
# Where this share of the energy is missed, it is far from any rounding level: no need to look closer.
_CLEARLY_FULL_RANK = 1e-4


def orthonormal_factors(
    matrix: Tensor, *, most: int, tolerance: float, likely: bool = False
) -> tuple[Tensor, Tensor] | None:
    """`matrix = U Y` with orthonormal columns in `U`, when its numerical rank is at most `most`.

    Halko, Martinsson, Tropp, "Finding structure with randomness", SIAM Review 53(2), 2011, Algorithm 4.1, with a fixed
    seed, so that the same matrix gives the same factors. The residual is formed and measured. A few rows say at small
    cost that a matrix is of full rank.

    Args:
        matrix: `[m, n]`; overwritten.
        most: largest rank that is of use.
        tolerance: largest `||matrix - U Y||_F` that counts as rounding.
        likely: the rank is expected to be low, so that those few rows are not worth their look.

    Returns:
        `U` `[m, r]` and `Y` `[r, n]`, or None when no `r <= most` reaches the tolerance.
    """
    m, n = matrix.shape
    width = most + _OVERSAMPLING
    if width >= min(m, n):
        return None
    if not likely and _corner_is_full(matrix[: 2 * width], most):
        return None
    basis: Tensor = torch.linalg.qr(matrix @ normal_numbers(n, width, like=matrix)).Q
    rows = basis.mT @ matrix
    eigenvalues, vectors = torch.linalg.eigh(gram(rows.mT.double()))
    total, *energies = torch.cat([squared_norms([matrix]), eigenvalues]).tolist()
    rank = sum(energy > tolerance**2 / width for energy in energies)
    if rank > most or total - sum(energies) > _CLEARLY_FULL_RANK * total:
        return None
    turn = vectors.flip(1)[:, :rank].to(matrix.dtype)
    basis = basis @ turn
    rows = turn.mT @ rows
    residual = matrix.addmm_(basis, rows, alpha=-1)
    return (basis, rows) if squared_norm(residual) <= tolerance**2 else None


def top_energies(matrices: Iterable[Tensor], directions: int) -> list[float]:
    """`||.||_F^2` of each matrix in its top `directions` singular directions.

    The energy of the top directions of `Q^T X`, with `Q` the range of `X X^T X` times random columns of a fixed seed,
    a few more than asked for: within a percent of the exact energy on flat spectra, exact to rounding where the rank is
    no larger, and exact for matrices with few more sides than directions. Source: as `orthonormal_factors`, Algorithm
    4.4 with one step. The host waits for a device as often as for one matrix.

    Args:
        matrices: at least one, all `[m, n]`; unchanged, and none is kept.
        directions: at least 1.
    """
    small = torch.stack([_sketched_gram(matrix, directions + _OVERSAMPLING) for matrix in matrices])
    eigenvalues = torch.linalg.eigvalsh(small).clamp(min=0)
    energies: list[float] = eigenvalues[:, -directions:].sum(dim=1).tolist()
    return energies


def _sketched_gram(matrix: Tensor, width: int) -> Tensor:
    """`[width, width]` float64, with the top eigenvalues of `X X^T`; all of them where `width` is no saving."""
    if matrix.shape[0] < matrix.shape[1]:
        matrix = matrix.mT
    if width >= matrix.shape[1]:
        return gram(matrix).double()
    basis: Tensor = torch.linalg.qr(matrix @ normal_numbers(matrix.shape[1], width, like=matrix)).Q
    basis = torch.linalg.qr(matrix @ (matrix.mT @ basis)).Q
    return gram((basis.mT @ matrix).mT).double()


def _corner_is_full(rows: Tensor, most: int) -> bool:
    """Whether some rows alone hold clearly more than `most` directions; `[2 w, n]`, so `O(w^2 n)` of arithmetic."""
    eigenvalues = torch.linalg.eigvalsh(gram(rows.mT).double()).clamp(min=0)
    return bool(eigenvalues[:-most].sum() > _CLEARLY_FULL_RANK * eigenvalues.sum())
