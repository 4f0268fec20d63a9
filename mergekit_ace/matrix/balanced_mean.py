"""The mean of task vectors whose second moments carry no information on the experts' inputs."""

from __future__ import annotations

import math

from torch import Tensor

from mergekit_ace.linalg.precision import squared_norm
from mergekit_ace.matrix.task_vectors import TaskVectors


def balanced_mean(task_vectors: TaskVectors) -> Tensor:
    """A weighted mean of the task vectors that is as long as one of them.

        M = sum_t w_t D_t,    w_t = a_t ||D_t||^(-1/2) / sum_s a_s ||D_s||^(-1/2)
        X = f M,              f = sqrt(sum_t w_t ||D_t||^2) / ||M||,  in [1, T]

    The plain mean of `T` orthogonal updates is `sqrt(T)` times shorter than one of them, and each expert keeps a `T`-th
    of its update; their sum is `sqrt(T)` times longer, and every expert receives all others in full. `f` is halfway
    between: `sqrt(T)` for orthogonal updates, 1 for equal ones. Without the weights the longest update costs the others
    more than it gains its own expert; weights of `1 / ||D_t||` overdo it. The result follows the unit of the updates,
    and does not depend on their order.

    Args:
        task_vectors: of one `[m, n]` weight, at least one expert, all with information; copies count each.

    Returns:
        `[m, n]`, working dtype. Opposite updates cancel.
    """
    balanced = [
        share / math.sqrt(math.sqrt(energy))
        for share, energy in zip(task_vectors.shares, task_vectors.energies, strict=True)
    ]
    total = math.fsum(balanced)
    merged = task_vectors.zeros(*task_vectors.buffer_shape)
    for t, weight in enumerate(balanced):
        merged.add_(task_vectors.task_vector(t), alpha=weight / total)
    energy = math.fsum(weight / total * e for weight, e in zip(balanced, task_vectors.energies, strict=True))
    of_mean = squared_norm(merged)
    if of_mean == 0:
        return merged
    return merged.mul_(min(float(len(task_vectors)), max(1.0, math.sqrt(energy / of_mean))))
