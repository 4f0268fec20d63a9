"""Centered arithmetic: the average, plus what stands out of it in each expert."""

from __future__ import annotations

from torch import Tensor

from mergekit_ace.linalg.subspace import singular_triples
from mergekit_ace.matrix.task_vectors import TaskVectors


def merge_centered_low_rank(task_vectors: TaskVectors, *, rank_fraction: float, scale: float) -> Tensor:
    """`A + scale * sum_t a_t SVD_k(D_t - A)` with the average `A = sum_t a_t D_t / T`.

    `SVD_k` keeps the top `k = floor(rank_fraction * min(m, n))` singular triples, at least one unless the fraction is
    0. Each deviation is truncated before the sum, since whole they cancel: `sum_t a_t (D_t - A) = 0`. So a fraction of
    1 (or 0) gives the average. `a_t` is the expert's share.

    Source: Choi et al., "Revisiting Weight Averaging for Model Merging" (CART), arXiv:2412.12153, Eq. 4.

    Args:
        task_vectors: of one `[m, n]` weight, at least one expert.
        rank_fraction: in `[0, 1]`.
        scale: the paper's lambda.

    Returns:
        `[m, n]`, working dtype.
    """
    average = task_vectors.mean()
    if rank_fraction == 0:
        return average
    k = max(1, int(rank_fraction * min(task_vectors.shape)))
    merged = average.clone()
    for t, share in enumerate(task_vectors.shares):
        top = singular_triples(task_vectors.task_vector(t).sub_(average), k)
        merged.addmm_(top.left * top.singular_values.to(merged.dtype), top.right.mT, alpha=scale * share)
    return merged
