"""ACTMat, arXiv:2604.01329: RegMean's solve with the uncentered proxy `D_t^T D_t`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.reference.weights import participants


def actmat(
    task_vectors: Sequence[Tensor],
    ridges: float | Sequence[float] = 0.0,
    weights: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """`(sum_t a_t D_t G_t) (sum_t a_t G_t)^-1` with `G_t = D_t^T D_t + r_t I`, `[m, n]`.

    `ridges` holds `r_t`, one for all experts or one for each expert that takes part in the layer.
    """
    D, a = participants(task_vectors, weights, dtype)
    if not D:
        return torch.zeros_like(task_vectors[0], dtype=dtype)
    if len(D) == 1:
        return D[0].clone()
    r = [ridges] * len(D) if isinstance(ridges, float) else list(ridges)
    identity = torch.eye(D[0].shape[1], dtype=dtype)
    G = [d.T @ d + r_t * identity for d, r_t in zip(D, r, strict=True)]
    numerator = sum(a_t * (d @ g) for a_t, d, g in zip(a, D, G, strict=True))
    denominator = sum(a_t * g for a_t, g in zip(a, G, strict=True))
    return numerator @ torch.linalg.inv(denominator)
