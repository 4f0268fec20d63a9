"""The covariance-based methods, composed: one solve, `X sum_t Sbar_t = sum_t N_t Sbar_t`, and how they differ.

| | second moment | numerator | divided by its trace | prior, refinement |
| --- | --- | --- | --- | --- |
| ACE, published | centered, `C_t^T C_t` | centered, `C_t` | in heterogeneous matrices | in heterogeneous matrices |
| ACE, default | `D_t^T D_t` | `D_t` | always | refined by disagreement, bounded |
| ACTMat | `D_t^T D_t` | `D_t` | never | no |
| WUDI | `D_t^T D_t` | `D_t` | always: its `||D_t||_F^2` is `tr D_t^T D_t` | no |

Without a ridge, ACTMat minimizes `sum_t ||(X - D_t) D_t^T||_F^2`, and WUDI the same with every term divided by
`||D_t||_F^2`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from mergekit_ace.matrix.options import Bounds, CovarianceOptions, Gate, SecondMoment, SpectralRefinement

ACE_PUBLISHED = CovarianceOptions(
    second_moment=SecondMoment(centered=True, epsilon=1e-2),
    gate=Gate(statistic="published", threshold=0.3),
    structural_prior=True,
    refinement=SpectralRefinement(fraction=0.3, of="residual", by_disagreement=False),
)
"""Xu et al., arXiv:2603.02945, Eqs. 5-19, at its program's epsilon."""

ACE = CovarianceOptions(
    second_moment=SecondMoment(),
    refinement=SpectralRefinement(fraction=0.3),
    bounds=Bounds(retention="by_size", length="by_size"),
    correlation_threshold=0.05,
    uncorrelated="balanced",
    combine_copies=True,
    precision="auto",
)
"""What `merge_method: ace` does by default: no constant of any model family, and no dependence on the weights' unit.

Identical experts give that expert, an expert and its copy count as one of twice the weight, and the merge is no longer
than twice the sum of all updates' norms. As far as the updates are large for the base it is no longer than the sum of
`sqrt(T_eff)` orthogonal ones, and the mean response under the experts' second moments is at most their own.
"""
ACE_HEAD = replace(
    ACE,
    refinement=None,
    bounds=Bounds(retention=True),
    correlation_threshold=0.0,
    uncorrelated="average",
    average_large=True,
)
"""What the default does to an output head: the solve and its retention, and the average as far as updates are large.

Refinement destroys models on a table. A head has rows for all of the vocabulary, so that its updates are no adapters,
and their rank is not looked for.
"""
ACE_0_1 = replace(ACE, uncorrelated="average", bounds=Bounds(retention=True, length="end_to_end"))
"""The default of 0.1: adapters whose second moments do not correlate are averaged, and large updates are added up."""

ACTMAT = CovarianceOptions(second_moment=SecondMoment(trace_normalized=False))
"""arXiv:2604.01329. The ridge is ours: with a fixed small one it loses whole tasks on real experts."""

WUDI = CovarianceOptions(second_moment=SecondMoment())
"""The minimizer of the objective of Cheng et al., arXiv:2503.08099, with the same ridge."""


def with_epsilon(options: CovarianceOptions, epsilon: float | Literal["auto"]) -> CovarianceOptions:
    """The same method with another ridge."""
    return replace(options, second_moment=replace(options.second_moment, epsilon=epsilon))
