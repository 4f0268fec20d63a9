"""How far a merged task vector may be from the base, and how loud."""

from __future__ import annotations

import math

from mergekit_ace.layer.agreement import mean_energy
from mergekit_ace.layer.options import CovarianceOptions
from mergekit_ace.layer.task_vectors import TaskVectors

# A net under an ill-conditioned solve; layers of real fine-tunes stay at about half of it.
_TIMES_END_TO_END = 2.0


def shortening(length: float, *, retention: float | None, longest: float) -> float:
    """What to multiply a merged task vector by, in `(0, 1]`, so that it is neither too loud nor too long.

    Args:
        length: `||X||_F`.
        retention: of the experts' own outputs; None where it has no bound.
        longest: that `||X||_F` may be.
    """
    factor = 1.0 if retention is None or retention <= 1 else 1 / retention
    return min(factor, longest / length) if length > 0 else factor


def longest_allowed(
    task_vectors: TaskVectors, options: CovarianceOptions, *, independent: float | None, low_rank: bool
) -> float:
    """The largest `||X||_F` that the options allow.

    With `E = mean_t(a_t e_t)`: `sqrt(T_eff E)`, the length of the sum of `T_eff` orthogonal updates; half the way from
    one update to that, `sqrt(sqrt(T_eff) E)`, for updates of low rank; `2 sum_t a_t sqrt(e_t)`, twice all updates laid
    end to end, where others are to be bounded by `auto`.

    Args:
        task_vectors: of the layer.
        options: `length_bound`.
        independent: `T_eff`; None where no option asks for it.
        low_rank: the updates are of low rank.
    """
    if not options.length_bound or independent is None:
        return math.inf
    if low_rank:
        return math.sqrt(math.sqrt(independent) * mean_energy(task_vectors))
    if options.length_bound == "auto":
        shares = task_vectors.shares
        end_to_end = math.fsum(s * energy**0.5 for s, energy in zip(shares, task_vectors.energies, strict=True))
        return _TIMES_END_TO_END * end_to_end
    return math.sqrt(independent * mean_energy(task_vectors))
