"""Task singular vectors: every expert keeps its strongest directions, made orthogonal to the others'."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_ace.linalg.subspace import polar_factor
from mergekit_ace.matrix.task_vectors import TaskVectors


def merge_task_singular_vectors(
    task_vectors: TaskVectors, *, power: float = 1.0, floors: Sequence[float] | None = None
) -> Tensor:
    """`polar([U_1 .. U_T]) diag(a_1 s_1 .. a_T s_T) polar([V_1 .. V_T])^T` of each task vector's top singular triples.

    Each of the `T` experts gives `k = floor(r / T)` triples, `r = min(m, n)`; with more experts than `r`, one. The
    polar factor is the nearest matrix with orthonormal columns, so directions that experts share are pulled apart.
    Directions beyond an expert's numerical rank (adapters) are no directions, and take no part. `a_t`, the expert's
    share, scales its singular values.

    Kept meanwhile: the triples, `[m, T k]` and `[n, T k]`, so no more than `r (m + n)` values for `T <= r`.

    Source: Gargiulo et al., "Task Singular Vectors: Reducing Task Interference in Model Merging", CVPR 2025,
    arXiv:2412.00081, Algorithm 1. Where `T > r` the formula keeps nothing; one triple each is ours.

    Args:
        task_vectors: of one `[m, n]` weight, at least one expert.
        power: each expert's singular values are raised to it, and scaled to their norm before; 1 is the published
            method.
        floors: of each expert, below which a singular value is rounding whatever the largest is.

    Returns:
        `[m, n]`, working dtype.
    """
    k = max(1, min(task_vectors.shape) // len(task_vectors))
    left, singular_values, right = [], [], []
    for t, share in enumerate(task_vectors.shares):
        triples = task_vectors.singular_triples(t, k, floor=floors[t] if floors else 0.0)
        left.append(triples.left)
        singular_values.append(share * _evened(triples.singular_values, power))
        right.append(triples.right)
    scaled = polar_factor(torch.cat(left, dim=1)).mul_(torch.cat(singular_values))
    return scaled @ polar_factor(torch.cat(right, dim=1)).mT


def _evened(singular_values: Tensor, power: float) -> Tensor:
    """`c s^p`, of the norm of `s`."""
    if power == 1 or len(singular_values) == 0:
        return singular_values
    relative = (singular_values / singular_values[0]).pow(power)
    norm = torch.linalg.vector_norm(singular_values) / torch.linalg.vector_norm(relative)
    return relative.mul(norm)
