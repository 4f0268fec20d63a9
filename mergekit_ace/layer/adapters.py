"""Telling the updates of adapters from full fine-tunes, by their rank."""

from __future__ import annotations

from mergekit_ace.layer.task_vectors import TaskVectors
from mergekit_ace.linalg.low_rank import captured_energy

# Adapters of rank 4 to 64 hold all of an update's energy in fewer directions than this; full fine-tunes of real models
# hold half to three quarters in an eighth of them.
_FEW_DIRECTIONS = 1 / 8
_MOST_DIRECTIONS = 128
_NEARLY_ALL = 0.9
LEAST_SHRINKAGE = 0.95
"""Share of the identity in an adapter's second moment, at the least. Its `m` rows are combinations of a few, which
mostly are the random start of training: no `m` samples of the inputs, as the estimate of the ridge would have it."""


def are_low_rank(task_vectors: TaskVectors) -> bool:
    """Whether an eighth of the directions (128 at most) holds 90 percent of the updates' energy, in the mean.

    Found from the tensors; adapters that were merged and rounded to bfloat16 count, though their rank is full.

    Args:
        task_vectors: of at least one expert.
    """
    directions = min(_MOST_DIRECTIONS, max(1, int(_FEW_DIRECTIONS * min(task_vectors.shape))))
    shares = task_vectors.shares
    captured = (captured_energy(task_vectors.task_vector(t), directions) for t in range(len(task_vectors)))
    mean = sum(share * part for share, part in zip(shares, captured, strict=True)) / len(task_vectors)
    return mean >= _NEARLY_ALL
