"""Isotropic merging: the directions of the experts' sum, all equally strong."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from mergekit_ace.linalg.subspace import dominant_subspace, polar_factor, rounding_floor, singular_triples
from mergekit_ace.matrix.task_vectors import TaskVectors

MeanOver = Literal["existing", "all"]
"""Which singular values a level is the mean of. Adapters have `T r` of `min(m, n)` directions: with the zeros of all
others in the mean, what is merged is some percent as long as one update."""


def merge_isotropic(task_vectors: TaskVectors, *, mean_over: MeanOver) -> Tensor:
    """Iso-C: `mean(s) U V^T` of `sum_t a_t D_t = U diag(s) V^T`.

    The mean is over the singular values of the sum's numerical rank, or over all `min(m, n)` as in the paper: the same
    for full fine-tunes. Directions beyond the rank stay zero either way. `a_t` is the expert's share.

    Source: Marczak et al., "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces", ICML
    2025, arXiv:2502.04959, Algorithm 1.

    Args:
        task_vectors: of one `[m, n]` weight, at least one expert. A single one is flattened too.
        mean_over: the directions that exist, or all.

    Returns:
        `[m, n]`, working dtype.
    """
    floor = len(task_vectors) * task_vectors.rounding
    spectrum = dominant_subspace(task_vectors.sum(), min(task_vectors.shape), floor=floor)
    counted = len(spectrum.singular_values) if mean_over == "all" else int((spectrum.singular_values > 0).sum())
    return spectrum.partial_isometry.mul_(float(spectrum.singular_values.sum()) / max(1, counted))


def merge_isotropic_subspaces(task_vectors: TaskVectors, *, common_fraction: float, mean_over: MeanOver) -> Tensor:
    """Iso-CTS: `mean(s) polar([U_c U_1 .. U_T]) polar([V_c V_1 .. V_T])^T`, common and own directions.

    `U_c, s_c, V_c` are the top `c = floor(common_fraction * r)` singular triples of `sum_t a_t D_t`, `r = min(m, n)`;
    `U_t, s_t, V_t` the top `floor((r - c) / T)` of the residual `(I - U_c U_c^T) a_t D_t`. Directions beyond a
    numerical rank take no part; their zeros count in the mean of `all`, the paper's, and not in that of the `existing`.
    `a_t` is the expert's share.

    The residuals' left vectors are orthogonal to `U_c` as they are, so their polar factor is taken by itself.

    Source: Marczak et al., arXiv:2502.04959, Algorithm 2. Where that leaves no direction at all (`c = 0`, and fewer
    than `T` left), one common direction is kept; that is ours.

    Args:
        task_vectors: of one `[m, n]` weight, at least one expert.
        common_fraction: in `[0, 1]`.
        mean_over: the directions that exist, or all.

    Returns:
        `[m, n]`, working dtype.
    """
    r = min(task_vectors.shape)
    common = int(common_fraction * r)
    specific = (r - common) // len(task_vectors)
    if common == specific == 0:
        common = 1
    # Experts that cancel in the sum, or lie within the common space, leave rounding behind: those are no directions.
    stored = task_vectors.rounding
    floors = [
        share * (stored + rounding_floor(math.sqrt(energy), task_vectors.dtype))
        for share, energy in zip(task_vectors.shares, task_vectors.energies, strict=True)
    ]
    shared = singular_triples(task_vectors.sum(), common, floor=sum(floors))
    total, right = shared.singular_values.sum(), [shared.right]
    own_left = []
    for t, share in enumerate(task_vectors.shares if specific else ()):
        update = task_vectors.task_vector(t).mul_(share)
        update.addmm_(shared.left, shared.left.mT @ update, alpha=-1)
        own = singular_triples(update, specific, floor=floors[t])
        own_left.append(own.left)
        total += own.singular_values.sum()
        right.append(own.right)
    left = torch.cat([shared.left, polar_factor(torch.cat(own_left, dim=1))], dim=1) if own_left else shared.left
    counted = common + specific * len(task_vectors) if mean_over == "all" else sum(part.shape[1] for part in right)
    level = float(total) / max(1, counted)
    return left.mul(level) @ polar_factor(torch.cat(right, dim=1)).mT
