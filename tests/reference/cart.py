"""CART, Choi et al., "Revisiting Weight Averaging for Model Merging", arXiv:2412.12153, Eq. 4 there."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.reference.subspace import truncated
from tests.reference.weights import participants


def cart(
    task_vectors: Sequence[Tensor],
    rank: int,
    scale: float = 1.0,
    weights: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """`A + scale * sum_t a_t SVD_rank(D_t - A)` with the average `A = (1/T) sum_t a_t D_t`, `[m, n]`."""
    D, a = participants(task_vectors, weights, dtype)
    if not D:
        return torch.zeros_like(task_vectors[0], dtype=dtype)
    if len(D) == 1:
        return D[0].clone()
    average = sum(a_t * d for a_t, d in zip(a, D, strict=True)) / len(D)
    deviations = torch.zeros_like(average)
    for a_t, d in zip(a, D, strict=True):
        U, s, Vh = truncated(d - average, rank)
        deviations += a_t * (U @ torch.diag(s) @ Vh)
    return average + scale * deviations
