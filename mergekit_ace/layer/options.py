"""What a covariance-based merge of one layer may be told, and nothing that it can find out itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mergekit_ace.layer.heterogeneity import HeterogeneityStatistic

When = Literal["never", "heterogeneous", "always"]


@dataclass(frozen=True, kw_only=True)
class CovarianceOptions:
    """Options of `merge_by_covariance`. The defaults are ACE as published (arXiv:2603.02945), at its program's epsilon.

    Attributes:
        epsilon: ridge, `> 0`, in units of the second moments; or `auto`, shrinkage estimated from the task vectors.
        center_second_moment: take second moments of the centered task vectors (paper, Eq. 5).
        center_numerator: put the centered task vectors in the numerator (paper, Eq. 14), which drops every update's
            mean row.
        heterogeneity: statistic that is compared with the threshold.
        heterogeneity_threshold: `>= 0`; the layer is heterogeneous above it. 0: every layer; infinity: none.
        trace_normalization: when each second moment is divided by its trace (paper, Eqs. 8-10).
        refinement: when the spectrum is refined (paper, Eqs. 15-19).
        spectral_fraction: share of `min(m, n)` singular directions refined, in `[0, 1]`.
        refined: what the spectrum is refined of: `residual`, `F = R + W0` (paper, Eq. 17), or the preliminary `merge`
            alone.
        refinement_scale: `full`, as in the paper, or `disagreement`: times `1 - 1 / T_eff`, nothing where all experts
            agree and all but `1 / T` where their updates are orthogonal.
        retention_bound: shorten a merged task vector that answers louder to the experts' inputs, in the mean, than they
            do themselves (`Solution.retention` above 1). Centering must be the same in both places.
        length_bound: shorten a merged task vector that is longer than the sum of `T_eff` orthogonal updates of mean
            squared length would be; `T_eff` is `effective_experts`. `auto`: only where it is longer than twice all
            updates laid end to end. Either way, updates of low rank, whose few rows leave the solve free to exaggerate,
            are held to `sqrt(T_eff)` orthogonal ones.
        correlation_threshold: in `[0, 1]`; a layer whose updates are of low rank and whose experts' second moments
            correlate by less is averaged, because updates of adapters with random input matrices say nothing of their
            inputs. 0: no layer.
        combine_copies: count an expert and its exact copies as one of their summed weight.
        structural_prior: add the collective structural prior (paper, Eqs. 11-13).

    Raises:
        ValueError: a value is out of its range.
    """

    epsilon: float | Literal["auto"] = 1e-2
    center_second_moment: bool = True
    center_numerator: bool = True
    heterogeneity: HeterogeneityStatistic = "published"
    heterogeneity_threshold: float = 0.3
    trace_normalization: When = "heterogeneous"
    refinement: When = "heterogeneous"
    spectral_fraction: float = 0.3
    refined: Literal["residual", "merge"] = "residual"
    refinement_scale: Literal["full", "disagreement"] = "full"
    retention_bound: bool = False
    length_bound: bool | Literal["auto"] = False
    correlation_threshold: float = 0.0
    combine_copies: bool = False
    structural_prior: bool = True

    def __post_init__(self) -> None:
        if self.epsilon != "auto" and not (0 < self.epsilon < math.inf):
            raise ValueError(f"epsilon must be a finite number above 0 or 'auto'; got {self.epsilon!r}")
        if not self.heterogeneity_threshold >= 0:
            raise ValueError(f"heterogeneity_threshold must be at least 0; got {self.heterogeneity_threshold!r}")
        if not 0 <= self.correlation_threshold <= 1:
            raise ValueError(f"correlation_threshold must lie in [0, 1]; got {self.correlation_threshold!r}")
        if not 0 <= self.spectral_fraction <= 1:
            raise ValueError(f"spectral_fraction must lie in [0, 1]; got {self.spectral_fraction!r}")
        if self.retention_bound and self.center_second_moment != self.center_numerator:
            raise ValueError("retention_bound must go with center_second_moment and center_numerator being the same")

    @property
    def asks_for_agreement(self) -> bool:
        """Whether `effective_experts` is needed."""
        return bool(self.length_bound) or self.refinement_scale == "disagreement"

    @property
    def asks_for_rank(self) -> bool:
        """Whether it matters that updates are of low rank."""
        return bool(self.length_bound) or self.correlation_threshold > 0

    @property
    def asks_for_moment_norms(self) -> bool:
        """Whether the Frobenius norm of each second moment is needed."""
        return self.epsilon == "auto" or self.correlation_threshold > 0 or self.retention_bound

    def is_heterogeneous(self, heterogeneity: float) -> bool:
        """The gate. A threshold of 0 means every layer, also one whose experts are equally strong."""
        return heterogeneity > self.heterogeneity_threshold or self.heterogeneity_threshold == 0
