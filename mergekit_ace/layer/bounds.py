"""How far a merged task vector may be from the base, and how loud."""

from __future__ import annotations

import math

from mergekit_ace.layer.agreement import mean_energy
from mergekit_ace.layer.options import CovarianceOptions
from mergekit_ace.layer.task_vectors import TaskVectors
from mergekit_ace.linalg.low_rank import captured_energy

# Adapters of rank 4 to 64 hold all of an update's energy in fewer directions than this; full fine-tunes of real models
# hold half to three quarters in an eighth of them.
_FEW_DIRECTIONS = 1 / 8
_MOST_DIRECTIONS = 128
_NEARLY_ALL = 0.9
# A net under an ill-conditioned solve; layers of real fine-tunes stay at about half of it.
_TIMES_END_TO_END = 2.0


def are_low_rank(task_vectors: TaskVectors) -> bool:
    """Whether an eighth of the directions (128 at most) holds 90 percent of the updates' energy, in the mean.

    Found from the tensors; adapters that were merged and rounded to bfloat16 count, though their rank is full.
    """
    directions = min(_MOST_DIRECTIONS, max(1, int(_FEW_DIRECTIONS * min(task_vectors.shape))))
    shares = task_vectors.shares
    captured = (captured_energy(task_vectors.task_vector(t), directions) for t in range(len(task_vectors)))
    mean = sum(share * part for share, part in zip(shares, captured, strict=True)) / len(task_vectors)
    return mean >= _NEARLY_ALL


def longest(task_vectors: TaskVectors, options: CovarianceOptions, *, independent: float, low_rank: bool) -> float:
    """The largest `||X||_F` that the options allow.

    `sqrt(T_eff mean_t(a_t e_t))`, the length of the sum of `T_eff` orthogonal updates, or
    `2 sum_t a_t sqrt(e_t)`, twice that of all updates laid end to end.

    Args:
        task_vectors: of the layer.
        options: `length_bound`.
        independent: `T_eff`.
        low_rank: the updates are of low rank.
    """
    if not options.length_bound:
        return float("inf")
    if options.length_bound == "auto" and not low_rank:
        shares = task_vectors.shares
        end_to_end = math.fsum(s * energy**0.5 for s, energy in zip(shares, task_vectors.energies, strict=True))
        return _TIMES_END_TO_END * end_to_end
    return math.sqrt(independent * mean_energy(task_vectors))
