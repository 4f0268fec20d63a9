"""The covariance-based methods on one screen: one solve, `X sum_t Sbar_t = sum_t N_t Sbar_t`, and how they differ.

| | second moment | numerator | divided by its trace | prior, refinement |
| --- | --- | --- | --- | --- |
| ACE, published | centered, `C_t^T C_t` | centered, `C_t` | in heterogeneous layers | in heterogeneous layers |
| ACE, default | `D_t^T D_t` | `D_t` | always | refined by disagreement, bounded |
| ACTMat | `D_t^T D_t` | `D_t` | never | no |
| WUDI | `D_t^T D_t` | `D_t` | always: its `||D_t||_F^2` is `tr D_t^T D_t` | no |

Without a ridge, ACTMat minimizes `sum_t ||(X - D_t) D_t^T||_F^2`, and WUDI the same with every term divided by
`||D_t||_F^2`.
"""

from __future__ import annotations

from dataclasses import replace

from mergekit_ace.layer.options import CovarianceOptions

ACE_PUBLISHED = CovarianceOptions()
"""Xu et al., arXiv:2603.02945, Eqs. 5-19, at its program's epsilon."""

ACE = CovarianceOptions(
    epsilon="auto",
    center_second_moment=False,
    center_numerator=False,
    heterogeneity="scale_free",
    heterogeneity_threshold=0.0,
    structural_prior=False,
    refined="merge",
    refinement_scale="disagreement",
    retention_bound=True,
    length_bound="auto",
    correlation_threshold=0.05,
    combine_copies=True,
)
"""What `merge_method: ace` does by default: no constant of any model family, and no dependence on the updates' unit.

Identical experts give that expert, an expert and its copy count as one of twice the weight, the merge answers to the
experts' inputs no louder than they do, and is never farther from the base than twice all updates laid end to end.
"""

ACTMAT = CovarianceOptions(
    epsilon="auto",
    center_second_moment=False,
    center_numerator=False,
    trace_normalization="never",
    structural_prior=False,
    refinement="never",
)
"""arXiv:2604.01329. The ridge is ours: with a fixed small one it loses whole tasks on real experts."""

WUDI = replace(ACTMAT, trace_normalization="always")
"""The minimizer of the objective of Cheng et al., arXiv:2503.08099, with the same ridge."""
