"""Iso-C and Iso-CTS, Marczak et al., "No Task Left Behind", arXiv:2502.04959, Algorithms 1 and 2."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tests.reference.subspace import polar_factor, top_isometry, truncated
from tests.reference.weights import participants


def iso_c(
    task_vectors: Sequence[Tensor],
    weights: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float64,
    mean_over: str = "existing",
) -> Tensor:
    """`mean(s) U V^T` of `sum_t a_t D_t = U diag(s) V^T`, `[m, n]`.

    The mean is over all `min(m, n)` values in the paper; over those that do not vanish for `existing`.
    """
    D, a = participants(task_vectors, weights, dtype)
    if not D:
        return torch.zeros_like(task_vectors[0], dtype=dtype)
    if len(D) == 1:
        return D[0].clone()
    total = sum(a_t * d for a_t, d in zip(a, D, strict=True))
    isometry, s = top_isometry(total, min(total.shape))
    return _mean(s, torch.linalg.matrix_rank(isometry, tol=0.5) if mean_over == "existing" else len(s)) * isometry


def iso_cts(
    task_vectors: Sequence[Tensor],
    common_fraction: float = 0.8,
    weights: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float64,
    mean_over: str = "existing",
) -> Tensor:
    """Common and task-specific directions, flattened to their mean singular value, `[m, n]`.

    `k = floor(common_fraction * r)` triples of the sum, then `floor((r - k) / T)` of each `(I - U_k U_k^T) D_t`;
    at least one direction in all. The stacked left and right factors are replaced by their polar factors, all values by
    the mean of the kept ones, or of those of them that do not vanish (`existing`).
    """
    D, a = participants(task_vectors, weights, dtype)
    if not D:
        return torch.zeros_like(task_vectors[0], dtype=dtype)
    if len(D) == 1:
        return D[0].clone()
    total = sum(a_t * d for a_t, d in zip(a, D, strict=True))
    r = min(total.shape)
    common = math.floor(common_fraction * r)
    specific = (r - common) // len(D)
    if common == specific == 0:
        common = 1
    norms = [a_t * float(d.norm()) for a_t, d in zip(a, D, strict=True)]
    U, s, Vh = truncated(total, common, scale=sum(norms))
    parts = [(U, s, Vh)]
    for a_t, d, norm in zip(a, D, norms, strict=True):
        parts.append(truncated(a_t * (d - U @ (U.T @ d)), specific, scale=norm))
    left = torch.cat([u for u, _, _ in parts], dim=1)
    values = torch.cat([s for _, s, _ in parts])
    right = torch.cat([vh.T for _, _, vh in parts], dim=1)
    level = _mean(values, int((values > 0).sum()) if mean_over == "existing" else len(values))
    return level * polar_factor(left) @ polar_factor(right).T


def _mean(values: Tensor, count: int | Tensor) -> Tensor:
    return values.sum() / max(1, int(count))
