"""How much the experts' updates of a layer agree."""

from __future__ import annotations

import torch

from mergekit_ace.layer.task_vectors import TaskVectors


def effective_experts(task_vectors: TaskVectors) -> float:
    """How many independent updates the experts' amount to: 1 when all are the same, `T` when all are orthogonal.

        T_eff = mean_t(a_t e_t) / ||mean_t(a_t D_t)||_F^2,    e_t = ||D_t||_F^2

    The squared length of a mean of `T` orthogonal vectors of one length is a `T`-th of their squared length. An expert
    and its copy count as one of twice the weight. Updates that oppose one another are more than independent, at most
    `T^2`.

    Args:
        task_vectors: of at least one expert.
    """
    count = len(task_vectors)
    mean = float(torch.linalg.vector_norm(task_vectors.sum(), dtype=torch.float64)) / count
    # Rounding may put the ratio of identical updates a little below one.
    return min(float(count**2), max(1.0, mean_energy(task_vectors) / mean**2)) if mean > 0 else float(count**2)


def mean_energy(task_vectors: TaskVectors) -> float:
    """`mean_t(a_t e_t)`, the squared length of an update in the mean."""
    weighted = zip(task_vectors.shares, task_vectors.energies, strict=True)
    return sum(share * energy for share, energy in weighted) / len(task_vectors)
