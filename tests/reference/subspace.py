"""Singular subspaces by the full SVD."""

import torch
from torch import Tensor

# Below this share of the largest singular value, float64 (float32) leaves nothing but rounding in a direction.
RELATIVE_RANK = {torch.float64: 1e-10, torch.float32: 1e-5}


def top_isometry(matrix: Tensor, k: int, relative_rank: float | None = None) -> tuple[Tensor, Tensor]:
    """`U_k V_k^T` and all of the top k singular values of `[m, n]`.

    The singular vectors of a vanishing singular value are arbitrary, so those directions are left out of
    `U_k V_k^T`; their (zero) values stay among the k returned. `relative_rank` is the share of the largest value below
    which a value counts as vanishing: that of the matrix's dtype unless its entries are less exact than that.
    """
    U, s, Vh = torch.linalg.svd(matrix, full_matrices=False)
    known = s[:k] > (relative_rank or RELATIVE_RANK[matrix.dtype]) * s[0]
    return U[:, :k][:, known] @ Vh[:k][known], s[:k]


def polar_factor(matrix: Tensor) -> Tensor:
    """The nearest partial isometry `U V^T`, vanishing directions left out."""
    return top_isometry(matrix, min(matrix.shape))[0]


def truncated(matrix: Tensor, k: int, scale: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """The top k singular triples: `U [m, k]`, `s [k]`, `Vh [k, n]`; zeros in the place of vanishing directions.

    `scale` is the size of the terms of the difference that `matrix` is, if larger than what is left of them.
    """
    U, s, Vh = torch.linalg.svd(matrix, full_matrices=False)
    known = (s > RELATIVE_RANK[matrix.dtype] * s[0].clamp(min=scale)).to(matrix.dtype)
    return (U * known)[:, :k], (s * known)[:k], (Vh * known[:, None])[:k]
