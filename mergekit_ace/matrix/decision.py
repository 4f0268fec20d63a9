"""What is decided of one matrix, in one place, before anything is factorized."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mergekit_ace.linalg.low_rank import top_energies
from mergekit_ace.linalg.precision import squared_norms
from mergekit_ace.matrix.bounds import effective_experts, large_share, longest_allowed
from mergekit_ace.matrix.options import CovarianceOptions, HeterogeneityStatistic
from mergekit_ace.matrix.stored_task_vectors import StoredTaskVectors
from mergekit_ace.matrix.task_vectors import TaskVectors

# Adapters of rank 4 to 64 hold all of an update's energy in fewer directions than this; full fine-tunes of real models
# hold half to three quarters in an eighth of them.
_FEW_DIRECTIONS = 1 / 8
_MOST_DIRECTIONS = 128
# Below the first share an update counts as one of full rank, above the second as one of low rank; linear between them.
_MOST, _NEARLY_ALL = 0.9, 0.98
# Smaller and larger side of the sample of rows and columns that shows most full fine-tunes to be no adapters, where the
# smaller side is longer. A sample holds more of its energy in as many directions than the whole, but by chance.
_SAMPLED = (1024, 2048)
_CLEARLY = 0.05
# A sample with less of the energy than this share of what its size would have is no estimate of the whole.
_REPRESENTATIVE = 0.5
# Updates that are nearly all rounding have no spectrum left to judge by; their quotient must stay finite.
_LEAST_GENUINE = 0.05
# Points of an integral over a smooth density.
_QUADRATURE = 512
_LEAST_SHRINKAGE = 0.95
"""Share of the identity in an adapter's second moment, at the least. Its `m` rows are combinations of a few, which
mostly are the random start of training: no `m` samples of the inputs, as the estimate of the ridge would have it."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """How one matrix is merged."""

    heterogeneity: float
    """The statistic of the gate; the scale-free one where there is no gate."""
    heterogeneous: bool | None
    """What the gate found; None where there is none."""
    trace_normalized: bool
    """Each second moment is divided by its trace."""
    refined_directions: int
    """How many singular directions are refined; 0: none."""
    refined_residual: bool
    """They are those of the residual plus the preliminary merge, so the solve has to give the residual."""
    low_rank: float | None
    """How far the updates are of low rank, from 0 to 1; None where no part asks for it."""
    effective_experts: float | None
    """How many independent updates the experts' amount to; None where no part asks for it."""
    longest: float
    """The largest `||X||_F`."""
    refinement_scale: float = 1.0
    """What the directions are refined by: 1, or `1 - 1 / T_eff` where it is by disagreement."""
    large: float = 0.0
    """How far the updates are large for their base, from 0 to 1; 0 where no part asks for it."""
    retained: float = 1.0
    """How far the bound of the retention holds, from 0 to 1."""
    held: float = math.inf
    """The `||X||_F` that large updates are held to, where a bound by size asks for it: that of the sum of `sqrt(T_eff)`
    orthogonal ones."""

    @property
    def least_shrinkage(self) -> float:
        """Smallest share of the identity in an estimated ridge."""
        return _LEAST_SHRINKAGE * (self.low_rank or 0.0)


def decide(task_vectors: TaskVectors, options: CovarianceOptions) -> Decision:
    """Decide from the task vectors' norms and rank how they are merged (ACE, arXiv:2603.02945, Eqs. 7-10 and 15-19).

    Args:
        task_vectors: of at least one expert.
        options: what the merge is composed of.
    """
    gate, refinement = options.gate, options.refinement
    # The published statistic depends on the unit of the weights.
    energies = [energy * task_vectors.unit**2 for energy in task_vectors.energies]
    spread = heterogeneity(energies, gate.statistic if gate else "scale_free")
    heterogeneous = None if gate is None else spread > gate.threshold
    passes = heterogeneous is not False
    directions = int(refinement.fraction * min(task_vectors.shape)) if refinement and passes else 0
    independent = effective_experts(task_vectors) if options.needs_agreement else None
    low_rank = low_rank_share(task_vectors) if options.needs_rank else None
    # Held nearer because few rows estimate little. A measured second moment needs that no more, but the network does
    # where the updates are large for its weights: what was added up is then noise to every expert.
    large = large_share(task_vectors) if options.needs_size or task_vectors.measured else 0.0
    nearer = (low_rank or 0.0) * (large if task_vectors.measured else 1.0)
    retained_by_size = options.bounds.retention == "by_size" and not task_vectors.measured
    return Decision(
        heterogeneity=spread,
        heterogeneous=heterogeneous,
        trace_normalized=options.second_moment.trace_normalized and passes,
        refined_directions=directions,
        refined_residual=directions > 0 and refinement is not None and refinement.of == "residual",
        low_rank=low_rank,
        effective_experts=independent,
        longest=longest_allowed(task_vectors, options.bounds.length, independent=independent, low_rank=nearer),
        # Published merges that are asked for a length bound know `T_eff` too, and are refined in full.
        refinement_scale=1 - 1 / independent if refinement and refinement.by_disagreement and independent else 1.0,
        large=large if options.needs_size else 0.0,
        # Few rows leave the solve free to exaggerate; measured second moments tell how far it does.
        retained=max(large, low_rank or 0.0) if retained_by_size else 1.0,
        held=longest_allowed(task_vectors, "orthogonal", independent=independent, low_rank=1.0)
        if options.bounds.length == "by_size"
        else math.inf,
    )


def heterogeneity(energies: Sequence[float], statistic: HeterogeneityStatistic) -> float:
    """Spread of the experts' update energies in one matrix.

        published:   Var(l) / Mean(l)^2,   l_t = log e_t     (ACE, arXiv:2603.02945, Eq. 7)
        scale_free:  Var(l)

    Args:
        energies: `e_t = ||D_t||_F^2`, all positive, of at least one expert.
        statistic: which of the two; the variance is the unbiased one.

    Returns:
        The statistic, `>= 0`; 0 for a single expert.
    """
    if len(energies) < 2:
        return 0.0
    logarithms = [math.log(energy) for energy in energies]
    variance = statistics.variance(logarithms)
    if statistic == "scale_free":
        return variance
    mean = statistics.fmean(logarithms)
    if variance == 0.0:
        return 0.0
    return variance / mean**2 if mean != 0.0 else math.inf


def low_rank_share(task_vectors: TaskVectors) -> float:
    """How far the updates are of low rank: from 0, as full fine-tunes, to 1, as adapters.

    By the share of the updates' energy, in the mean, that an eighth of the directions (128 at most) holds: 0 up to 90
    percent, 1 from 98 percent, linear between, so that the merge follows the updates continuously. The energy that
    rounding to the stored format adds is taken out first: it lies in all directions alike, and would make adapters
    that were merged and stored in bfloat16 look like full fine-tunes.

    As soon as the experts left cannot lift the mean above 90 percent, they are not looked at; and of large matrices a
    sample of rows and columns is looked at first, which ends it where it is clearly below.

    Args:
        task_vectors: of at least one expert.
    """
    m, n = task_vectors.shape
    rounding = task_vectors.rounding_energies()
    directions = min(_MOST_DIRECTIONS, max(1, int(_FEW_DIRECTIONS * min(m, n))))
    within = noise_share(m, n, directions)
    small, large = _SAMPLED
    if min(m, n) > small and isinstance(task_vectors, StoredTaskVectors):
        stored = task_vectors
        row_step, column_step = (-(-side // (small if side == min(m, n) else large)) for side in (m, n))

        def of_samples(experts: Sequence[int]) -> list[float]:
            samples = [stored.sample(t, row_step=row_step, column_step=column_step) for t in experts]
            part = samples[0].numel() / (m * n)
            energies = squared_norms(samples).tolist()
            shares = _held(top_energies(samples, directions), energies, [part * rounding[t] for t in experts], within)
            whole = [part * stored.energies[t] for t in experts]
            looked = zip(shares, energies, whole, strict=True)
            return [1.0 if energy < _REPRESENTATIVE * expected else share for share, energy, expected in looked]

        if _weighted_mean(task_vectors, of_samples, enough=_MOST - _CLEARLY) is None:
            return 0.0

    def of_all(experts: Sequence[int]) -> list[float]:
        tops = task_vectors.top_energies(experts, directions)
        return _held(tops, [task_vectors.energies[t] for t in experts], [rounding[t] for t in experts], within)

    mean = _weighted_mean(task_vectors, of_all, enough=_MOST)
    return 0.0 if mean is None else min(1.0, (mean - _MOST) / (_NEARLY_ALL - _MOST))


def _weighted_mean(
    task_vectors: TaskVectors, values: Callable[[Sequence[int]], list[float]], *, enough: float
) -> float | None:
    """`mean_t(a_t v_t)` of values of at most 1; None as soon as it cannot be above `enough`.

    An accelerator is asked for all values at once, since waiting for it takes longer than a few products.
    """
    count = len(task_vectors)
    at_once = 1 if task_vectors.device.type == "cpu" else count
    most = 1.0
    for start in range(0, count, at_once):
        experts = range(start, start + at_once)
        for t, value in zip(experts, values(experts), strict=True):
            most -= task_vectors.shares[t] * (1 - value) / count
        if most <= enough:
            return None
    return most


def _held(tops: Sequence[float], energies: Sequence[float], rounding: Sequence[float], within: float) -> list[float]:
    """Share of each update's energy, without that of rounding, in its top directions.

    Args:
        tops: energy in the top directions.
        energies: in all.
        rounding: that is expected of rounding, in all.
        within: `noise_share` of these directions.
    """
    shares = []
    for energy, lost, top in zip(energies, rounding, tops, strict=True):
        genuine = max(energy - lost, _LEAST_GENUINE * energy)
        # A sample may have missed all of an update.
        shares.append(min(1.0, max(0.0, top - within * lost) / genuine) if genuine > 0 else 1.0)
    return shares


def noise_share(m: int, n: int, directions: int) -> float:
    """Share of the energy of independent random entries `[m, n]` that its top singular directions hold.

    By the Marchenko-Pastur law: the squared singular values of such a matrix, of variance 1 over the larger side, have
    the density `sqrt((b - x) (x - a)) / x` between `a` and `b = (1 -+ sqrt(min / max))^2`, up to a constant.

    Args:
        m: rows.
        n: columns.
        directions: how many, `1 <= directions <= min(m, n)`.
    """
    root = math.sqrt(min(m, n) / max(m, n))
    low, high = (1 - root) ** 2, (1 + root) ** 2
    # In x = middle - half cos(t) the density has no pole at its ends.
    angles = [math.pi * (step + 0.5) / _QUADRATURE for step in range(_QUADRATURE)]
    values = [(low + high) / 2 - (high - low) / 2 * math.cos(angle) for angle in angles]
    counts = [math.sin(angle) ** 2 / value for angle, value in zip(angles, values, strict=True)]
    energies = [math.sin(angle) ** 2 for angle in angles]
    left, held = directions / min(m, n) * math.fsum(counts), 0.0
    for count, energy in zip(reversed(counts), reversed(energies), strict=True):
        part = min(1.0, left / count)
        held += part * energy
        left -= part * count
        if left <= 0:
            break
    return held / math.fsum(energies)
