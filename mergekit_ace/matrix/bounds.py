"""How much the experts' updates agree, and how far a merged task vector may therefore be from the base."""

from __future__ import annotations

import math

from mergekit_ace.matrix.options import LengthBound
from mergekit_ace.matrix.task_vectors import TaskVectors

_TOLERATED_UPDATE = 0.125
_STEEPNESS = 4
"""What is noise to an expert adds up over the blocks that its inputs pass. Of a 135M language model with 30 blocks, a
merge of updates of 6 percent in 8 blocks loses as much by its length as one of updates of 3 percent in all: the root of
the number of blocks counts. One of 3 percent in 6 blocks loses little. With random noise of twice the norm on every
matrix the loss was 16 times as large, hence the fourth power."""
_TYPICAL_DEPTH = 32
# Its share is far below rounding, and the power of more could overflow.
_CLEARLY_SMALL = 1e9
# A limit for an ill-conditioned solve; matrices of real fine-tunes stay at about half of it.
_TIMES_END_TO_END = 2.0


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
    mean = task_vectors.energy_of_mean
    # Rounding may put the ratio of identical updates a little below one.
    return min(float(count**2), max(1.0, mean_energy(task_vectors) / mean)) if mean > 0 else float(count**2)


def mean_energy(task_vectors: TaskVectors) -> float:
    """`mean_t(a_t e_t)`, the squared length of an update in the mean."""
    weighted = zip(task_vectors.shares, task_vectors.energies, strict=True)
    return sum(share * energy for share, energy in weighted) / len(task_vectors)


def large_share(task_vectors: TaskVectors) -> float:
    """How far updates are large for their base, from 0 for small ones to 1.

        w = s^4 / (s^4 + (1/8)^4),    s^2 = L mean_t(a_t ||D_t||^2) / ||W_0||^2

    `s` is what updates of this size come to over the `L` blocks of the model, in quadrature.

    Args:
        task_vectors: of at least one expert. Where the base's norm is not known, the updates count as small; where the
            depth is not known, it counts as 32, as of language models.
    """
    update = math.sqrt(mean_energy(task_vectors))
    if task_vectors.base_norm is None or update == 0:
        return 0.0
    depth = task_vectors.depth or _TYPICAL_DEPTH
    tolerated = _TOLERATED_UPDATE * task_vectors.base_norm / (math.sqrt(depth) * update)
    return 1 / (1 + min(tolerated, _CLEARLY_SMALL) ** _STEEPNESS)


def longest_allowed(
    task_vectors: TaskVectors, bound: LengthBound, *, independent: float | None, low_rank: float
) -> float:
    """The largest `||X||_F` that a length bound allows.

    With `E = mean_t(a_t e_t)`: `sqrt(T_eff E)`, the length of the sum of `T_eff` orthogonal updates (`orthogonal`);
    `2 sum_t a_t sqrt(e_t)`, twice all updates laid end to end (`end_to_end`, `by_size`). Updates of low rank are held
    to `sqrt(sqrt(T_eff) E)`, half the way from one update to `T_eff` orthogonal ones; between full and low rank the
    bound is the geometric mean, weighted by how far they are of low rank.

    Args:
        task_vectors: of the matrix.
        bound: which of them.
        independent: `T_eff`; None where nothing asks for it.
        low_rank: how far the updates are of low rank, from 0 to 1.
    """
    if bound == "none" or independent is None:
        return math.inf
    energy = mean_energy(task_vectors)
    if bound in ("end_to_end", "by_size"):
        norms = (share * e**0.5 for share, e in zip(task_vectors.shares, task_vectors.energies, strict=True))
        full = _TIMES_END_TO_END * math.fsum(norms)
    else:
        full = math.sqrt(independent * energy)
    low = min(full, math.sqrt(math.sqrt(independent) * energy))
    return math.pow(full, 1 - low_rank) * math.pow(low, low_rank)


def scale_factor(
    length: float,
    *,
    retention: float | None,
    longest: float,
    retained: float = 1.0,
    held: float = math.inf,
    large: float = 0.0,
) -> float:
    """What to multiply a merged task vector by, in `(0, 1]`, so that it keeps its bounds.

    Bounds by size hold as far as the updates are large for the base, on a logarithmic scale: of a retention `q > 1` is
    left `q^(1 - p)`, and `||X||^(1 - w) h^w` of `||X|| > h`.

    Args:
        length: `||X||_F`.
        retention: the mean response under the experts' second moments, relative to their own; None: no bound.
        longest: that `||X||_F` may be.
        retained: `p`, how far the bound of the retention holds, from 0 to 1.
        held: `h`, the length that large updates are held to.
        large: `w`, from 0 for small updates to 1.
    """
    factor = 1.0 if retention is None or retention <= 1 else math.pow(retention, -retained)
    if large > 0 and factor * length > held:
        factor *= (held / (factor * length)) ** large
    return min(factor, longest / length) if length > 0 else factor
