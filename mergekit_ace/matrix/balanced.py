"""The merge of task vectors whose second moments carry no information on the experts' inputs."""

from __future__ import annotations

import math

from torch import Tensor

from mergekit_ace.linalg.precision import squared_norm
from mergekit_ace.matrix.bounds import mean_energy
from mergekit_ace.matrix.peers.task_singular_vectors import merge_task_singular_vectors
from mergekit_ace.matrix.task_vectors import TaskVectors

_TOLERATED_NOISE = 0.1
"""Of a weight's norm. Random noise of 5 percent of every matrix's norm takes 2 percent of what experts of a 135M
language model gained, of 10 percent a third, of 20 percent more than all of it. To each expert other adapters, whose
input matrices are mostly the random start of training, are such noise."""


def merge_without_moments(task_vectors: TaskVectors) -> Tensor:
    """Balanced task singular vectors of small updates, the plain average of large ones.

        X = (1 - w) B + w mean_t(a_t D_t),    w = s^2 / (s^2 + 0.1^2),    s^2 = mean_t(a_t ||D_t||^2) / ||W_0||^2

    `B` is `merge_balanced`. It leaves each expert with the others' updates, which are noise to it, as long as one
    update; the average has `sqrt(T)` times less of it, and of the expert. A network bears noise up to some percent of
    its weights, and the loss grows with the noise's square.

    Args:
        task_vectors: of one `[m, n]` weight, at least one expert. Where the base's norm is not known, the updates count
            as small.

    Returns:
        `[m, n]`, working dtype.
    """
    averaged = averaged_share(task_vectors)
    merged = merge_balanced(task_vectors)
    return merged.lerp_(task_vectors.mean(), averaged) if averaged else merged


def averaged_share(task_vectors: TaskVectors) -> float:
    """`w` of `merge_without_moments`, from 0 for small updates to 1; a half at a tenth of the base's norm."""
    if task_vectors.base_norm is None:
        return 0.0
    update = mean_energy(task_vectors)
    return update / (update + (_TOLERATED_NOISE * task_vectors.base_norm) ** 2) if update > 0 else 0.0


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
