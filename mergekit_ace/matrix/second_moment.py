"""The regularized second moments of the experts, by their scalars: scale, ridge, correlation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from mergekit_ace.matrix.decision import Decision
from mergekit_ace.matrix.options import CovarianceOptions, SecondMoment
from mergekit_ace.matrix.task_vectors import TaskVectors

# Ridges are multiplied by shares and entries of task vectors, and added up.
_SUMMANDS = 1000


@dataclass(frozen=True, kw_only=True)
class RegularizedMoment:
    """`Sbar = scale * G + ridge * I`, the regularized second moment of one expert."""

    scale: float
    ridge: float
    trace: float
    """`tr G`."""
    squared_norm: float | None = None
    """`tr(G^2) = ||G||_F^2`, where something asked for it."""
    response: float | None = None
    """`tr(D Sbar D^T)`, where `Sbar` is not of the form above because the inputs of some expert were measured."""

    @property
    def own_response(self) -> float:
        """`tr(D Sbar D^T)`, the expert's response to its own inputs."""
        if self.response is not None:
            return self.response
        assert self.squared_norm is not None
        return self.scale * self.squared_norm + self.ridge * self.trace


def regularize(
    task_vectors: TaskVectors, t: int, options: CovarianceOptions, decision: Decision, *, squared: float | None
) -> RegularizedMoment:
    """Scale and ridge of expert `t`.

    An expert whose rows are all equal has no centered second moment: where that would be divided by its trace, or its
    ridge taken from it, it is left out.

    Args:
        task_vectors: of the matrix.
        t: which expert.
        options: fixed ridge or shrinkage.
        decision: whether to divide by the trace, and the least shrinkage.
        squared: `||G_t||_F^2`, or that of the smaller `X_t X_t^T`, whose eigenvalues are the same but for zeros; None
            where nothing asks for it.

    Raises:
        ValueError: a fixed ridge beyond the range of the working dtype.
    """
    moment = options.second_moment
    measured = task_vectors.statistics[t]
    m, n = task_vectors.shape
    trace = measured.centered_energy if moment.centered else measured.energy
    if trace == 0 and (decision.trace_normalized or moment.epsilon == "auto"):
        return RegularizedMoment(scale=0.0, ridge=0.0, trace=0.0, squared_norm=0.0)
    if moment.epsilon != "auto":
        return replace(_fixed(task_vectors, t, moment.epsilon, moment, decision), squared_norm=squared)
    assert squared is not None
    return shrunk_ridge(
        trace=trace,
        squared_norm=squared,
        samples=m - 1 if moment.centered else m,
        dimensions=n,
        normalize=decision.trace_normalized,
        least=decision.least_shrinkage,
    )


def _fixed(
    task_vectors: TaskVectors, t: int, given: float, moment: SecondMoment, decision: Decision
) -> RegularizedMoment:
    """The fixed ridge of expert `t`; where that of some expert is beyond the dtype, all are divided by the largest.

    The solution does not depend on a common factor, and the residual does.
    """
    # `epsilon` is in units of the experts' own second moments.
    epsilon = given / task_vectors.unit**2
    traces = [found.centered_energy if moment.centered else found.energy for found in task_vectors.statistics]
    largest = epsilon / min(filter(None, traces)) if decision.trace_normalized else epsilon
    fixed = fixed_ridge(epsilon, trace=traces[t], normalize=decision.trace_normalized)
    if largest <= torch.finfo(task_vectors.dtype).max / (_SUMMANDS * len(task_vectors)):
        return fixed
    if decision.refined_residual or not math.isfinite(largest):
        raise ValueError(
            f"{task_vectors.name}: epsilon must leave ridges that {task_vectors.dtype} can hold; {given:.3g} "
            f"makes one of {largest:.3g}. Set epsilon: auto, or a smaller one"
        )
    return replace(fixed, scale=fixed.scale / largest, ridge=fixed.ridge / largest)


def relative_ridge(moments: Sequence[RegularizedMoment], shares: Sequence[float], dimensions: int) -> float:
    """Ridge of `sum_t a_t Sbar_t` over the mean eigenvalue of `sum_t a_t scale_t G_t`; infinite where that is zero.

    Args:
        moments: of any number of experts.
        shares: `a_t`, one for each.
        dimensions: `n`.
    """
    ridge = sum(share * moment.ridge for share, moment in zip(shares, moments, strict=True))
    trace = sum(share * moment.scale * moment.trace for share, moment in zip(shares, moments, strict=True))
    return ridge * dimensions / trace if trace > 0 else float("inf")


def fixed_ridge(epsilon: float, *, trace: float, normalize: bool) -> RegularizedMoment:
    """`G + eps I`, or trace-normalized `(G + eps I) / tr G` (ACE, arXiv:2603.02945, Eqs. 8-10).

    Args:
        epsilon: the ridge, in units of `G`.
        trace: `tr G`, positive when `normalize`.
        normalize: divide by the trace.
    """
    unit = 1 / trace if normalize else 1.0
    return RegularizedMoment(scale=unit, ridge=epsilon * unit, trace=trace)


def shrunk_ridge(
    *, trace: float, squared_norm: float, samples: int, dimensions: int, normalize: bool, least: float = 0.0
) -> RegularizedMoment:
    """Oracle-approximating shrinkage: `(1 - rho) G + rho (tr G / n) I`, which keeps the trace; no constant to choose.

    The rows of a task vector are samples of the layer's input directions; their second moment over few rows has
    eigenvalues spread far wider than the true ones. `rho` minimizes the expected squared error of the convex
    combination, with the unknown covariance replaced by its own estimate until nothing changes:

        rho = min(1, ((1 - 2/n) tr(G^2) + tr(G)^2) / ((m + 1 - 2/n) (tr(G^2) - tr(G)^2 / n)))

    It does not change when `G` is multiplied by a constant. Source: Chen, Wiesel, Eldar, Hero, "Shrinkage algorithms
    for MMSE covariance estimation", IEEE Trans. Signal Processing 58(10), 2010, Eq. 23.

    Args:
        trace: `tr G`, positive.
        squared_norm: `tr(G^2) = ||G||_F^2`.
        samples: `m`, independent rows.
        dimensions: `n`.
        normalize: divide by the trace.
        least: smallest `rho`, for rows that are known to be no independent samples.
    """
    spread = squared_norm - trace**2 / dimensions
    intensity = 1.0
    if spread > 0:
        numerator = (1 - 2 / dimensions) * squared_norm + trace**2
        intensity = min(1.0, numerator / ((samples + 1 - 2 / dimensions) * spread))
    intensity = max(intensity, least)
    unit = 1 / trace if normalize else 1.0
    return RegularizedMoment(
        scale=(1 - intensity) * unit,
        ridge=intensity * trace / dimensions * unit,
        trace=trace,
        squared_norm=squared_norm,
    )


def moment_correlation(
    moments: Sequence[RegularizedMoment], shares: Sequence[float], *, summed_squared_norm: float, dimensions: int
) -> float:
    """Weighted mean correlation of the experts' second moments about the identity, in `[0, 1]`.

    With `S_t = G_t / tr G_t` and `E_t = S_t - I/n`, over all pairs of two different experts,

        sum_{s != t} w_s w_t <E_s, E_t> / sum_{s != t} w_s w_t ||E_s|| ||E_t||,    w_t = a_t scale_t tr G_t

    Experts of one base see inputs of much the same covariance, so their second moments correlate; row spaces that are a
    random start of training (a LoRA's `A`) do not. No pair of products is formed: `||sum_t w_t S_t||_F^2` holds all of
    them. Second moments that are multiples of the identity have nothing to correlate: 1.

    Args:
        moments: with their squared norms.
        shares: `a_t`.
        summed_squared_norm: `||sum_t a_t scale_t G_t||_F^2`.
        dimensions: `n`.
    """
    weights, squares = [], []
    for moment, share in zip(moments, shares, strict=True):
        assert moment.squared_norm is not None
        weights.append(share * moment.scale * moment.trace)
        squares.append(moment.squared_norm / moment.trace**2 if moment.trace > 0 else 0.0)
    lengths = [max(0.0, square - 1 / dimensions) ** 0.5 for square in squares]
    own = sum(w * w for w in weights)
    together = summed_squared_norm - sum(w * w * square for w, square in zip(weights, squares, strict=True))
    together -= (sum(weights) ** 2 - own) / dimensions
    most = sum(w * length for w, length in zip(weights, lengths, strict=True)) ** 2
    most -= sum((w * length) ** 2 for w, length in zip(weights, lengths, strict=True))
    return min(1.0, max(0.0, together / most)) if most > 0 else 1.0
