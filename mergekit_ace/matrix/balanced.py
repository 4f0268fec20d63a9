"""The merge of task vectors whose second moments carry no information on the experts' inputs."""

from __future__ import annotations

import math

from torch import Tensor

from mergekit_ace.matrix.bounds import effective_experts, mean_energy
from mergekit_ace.matrix.peers.task_singular_vectors import merge_task_singular_vectors
from mergekit_ace.matrix.storage_rounding import largest_of_noise
from mergekit_ace.matrix.task_vectors import TaskVectors

_TOLERATED_NOISE = 0.1
"""Of a weight's norm. Random noise of 5 percent of every matrix's norm takes 2 percent of what experts of a 135M
language model gained, of 10 percent a third, of 20 percent more than all of it. To each expert other adapters, whose
input matrices are mostly the random start of training, are such noise."""


def merge_without_moments(task_vectors: TaskVectors) -> Tensor:
    """Balanced task singular vectors of small updates, the plain average of large ones.

        X = (1 - w) B + w mean_t(a_t D_t),    w = s^2 / (s^2 + 0.1^2)
        s^2 = (T_eff - 1) mean_t(a_t ||D_t||^2) / ||W_0||^2

    `B` is `merge_balanced`. It leaves each expert with all others' updates, which are noise of the relative length `s`
    to it; the average has a `T`-th of it, and of the expert. A network bears noise up to some percent of its weights,
    and the loss grows with the noise's square.

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
    """`w` of `merge_without_moments`, from 0 for small updates to 1; a half where the noise is a tenth of the base."""
    if task_vectors.base_norm is None:
        return 0.0
    noise = (effective_experts(task_vectors) - 1) * mean_energy(task_vectors)
    return noise / (noise + (_TOLERATED_NOISE * task_vectors.base_norm) ** 2) if noise > 0 else 0.0


def merge_balanced(task_vectors: TaskVectors) -> Tensor:
    """Task singular vectors of updates balanced by norm, the more even in each the more experts are independent.

        B = TSV-M of a'_t f(D_t),    a'_t = a_t ||D_t||^(-1/2), scaled to a mean of 1
        f(U diag(s) V^T) = U diag(c s^p) V^T,    p = 1 / T_eff,    c so that the norm stays

    The singular vectors are made orthogonal, so that no expert's directions amplify another's. Of a real language
    model's adapters, which have most of their length in a few directions, each keeps more by the same length spread
    over all of them (docs/default.md). One expert, or several equal ones, interfere with none and stay as they are.
    Without the weights the longest update costs the others more than it gains its own expert. The result follows the
    unit of the updates, and not their order.

    Args:
        task_vectors: of one `[m, n]` weight, at least one expert.

    Returns:
        `[m, n]`, working dtype.
    """
    roots = [math.sqrt(math.sqrt(energy)) for energy in task_vectors.energies]
    weights = [share / root for share, root in zip(task_vectors.shares, roots, strict=True)]
    total = math.fsum(weights)
    balanced = task_vectors.with_shares([len(weights) * weight / total for weight in weights])
    # A more even spectrum would bring directions that rounding made to the level of the adapters'.
    floors = [largest_of_noise(math.sqrt(lost), task_vectors.shape) for lost in task_vectors.rounding_energies()]
    return merge_task_singular_vectors(balanced, power=1 / effective_experts(task_vectors), floors=floors)
