"""The merge of task vectors whose second moments carry no information on the experts' inputs."""

from __future__ import annotations

import math

from torch import Tensor

from mergekit_ace.linalg.precision import squared_norm
from mergekit_ace.matrix.peers.task_singular_vectors import merge_task_singular_vectors
from mergekit_ace.matrix.task_vectors import TaskVectors


def merge_balanced(task_vectors: TaskVectors) -> Tensor:
    """Task singular vectors of updates balanced by norm, and as long as one of them.

        S = TSV-M of a'_t D_t,    a'_t = a_t ||D_t||^(-1/2), scaled to a mean of 1
        X = f S,                  f = min(1, sqrt(mean_t a'_t ||D_t||^2) / ||S||)

    `S` is a sum whose singular vectors are made orthogonal, so that no expert's directions amplify another's. Yet each
    expert receives all others: the sum of `T` orthogonal updates is `sqrt(T)` times as long as one, and `f` is
    `1 / sqrt(T)`; it is 1 for equal updates, which give that update. Without the weights the longest update costs the
    others more than it gains its own expert. The result follows the unit of the updates, and not their order.

    Args:
        task_vectors: of one `[m, n]` weight, at least one expert.

    Returns:
        `[m, n]`, working dtype.
    """
    roots = [math.sqrt(math.sqrt(energy)) for energy in task_vectors.energies]
    weights = [share / root for share, root in zip(task_vectors.shares, roots, strict=True)]
    total = math.fsum(weights)
    balanced = task_vectors.with_shares([len(weights) * weight / total for weight in weights])
    merged = merge_task_singular_vectors(balanced)
    energy = math.fsum(share * e for share, e in zip(balanced.shares, balanced.energies, strict=True)) / len(weights)
    length = squared_norm(merged)
    return merged.mul_(math.sqrt(energy / length)) if length > energy else merged
