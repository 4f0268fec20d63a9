"""The parts that a covariance-based merge of one matrix is composed of."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

Precision = Literal["auto", "full"]
HeterogeneityStatistic = Literal["published", "scale_free"]
LengthBound = Literal["none", "end_to_end", "orthogonal", "by_size"]
RetentionBound = bool | Literal["by_size"]


@dataclass(frozen=True, kw_only=True)
class SecondMoment:
    """Which second moment stands for an expert's inputs.

    Attributes:
        centered: `C_t^T C_t` of the centered task vector, which then stands in the numerator too (paper, Eqs. 5 and
            14); otherwise `D_t^T D_t` and `D_t`.
        trace_normalized: divided by its trace (paper, Eqs. 8-10), in matrices that pass the gate.
        epsilon: ridge, `> 0`, in units of the second moment; or `auto`, shrinkage estimated from the task vectors.

    Raises:
        ValueError: `epsilon` is out of its range.
    """

    centered: bool = False
    trace_normalized: bool = True
    epsilon: float | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        if self.epsilon != "auto" and not (0 < self.epsilon < math.inf):
            raise ValueError(f"epsilon must be a finite number above 0 or 'auto'; got {self.epsilon!r}")


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Only heterogeneous matrices are trace-normalized and refined (paper, Eqs. 7-10 and 15).

    Raises:
        ValueError: `threshold` is negative or not a number.
    """

    statistic: HeterogeneityStatistic
    """Of the task vectors' energies."""
    threshold: float
    """`>= 0`; heterogeneous above it. Infinity: no matrix."""

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise ValueError(f"heterogeneity_threshold must be at least 0; got {self.threshold!r}")


@dataclass(frozen=True, kw_only=True)
class SpectralRefinement:
    """The dominant singular directions are added once more, at their mean level (paper, Eqs. 15-19).

    Attributes:
        fraction: share of the `min(m, n)` singular directions, in `[0, 1]`.
        of: `residual`: of `F = R + W0` (paper, Eq. 17); `merge`: of the preliminary merge `W0` alone.
        by_disagreement: times `1 - 1 / T_eff`: nothing where all experts agree, all but `1 / T` where their updates are
            orthogonal.

    Raises:
        ValueError: `fraction` is out of its range.
    """

    fraction: float
    of: Literal["residual", "merge"] = "merge"
    by_disagreement: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"spectral_fraction must lie in [0, 1]; got {self.fraction!r}")


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """How far a merged task vector may go.

    Attributes:
        retention: the mean response under the experts' regularized second moments is at most the experts' own;
            `by_size`: as far as the updates are large for the base or of low rank.
        length: `orthogonal`: `||X||_F` is at most that of the sum of `T_eff` orthogonal updates; `end_to_end`: at most
            twice the sum of all updates' norms; `by_size`: that of small updates, and the length of `sqrt(T_eff)`
            orthogonal ones, half the way from one to all, as far as they are large for the base. Either way updates of
            low rank, whose few rows leave the solve free to exaggerate, are held to `sqrt(T_eff)` orthogonal ones.
    """

    retention: RetentionBound = False
    length: LengthBound = "none"

    @property
    def asks_for_retention(self) -> bool:
        """Whether the retention of a merge is to be known."""
        return self.retention is not False


@dataclass(frozen=True, kw_only=True)
class CovarianceOptions:
    """What a covariance-based merge of one matrix is composed of; `presets` has the methods that we know.

    Attributes:
        second_moment: of every expert.
        gate: None: every matrix is treated alike.
        structural_prior: add the collective structural prior (paper, Eqs. 11-13).
        refinement: None: the preliminary merge is the merge.
        bounds: on the result.
        correlation_threshold: in `[0, 1]`; updates of low rank whose second moments correlate by less are merged
            without them, because adapters with random input matrices do not determine their inputs. 0: never.
        uncorrelated: how those are merged: by `merge_without_moments`, or as their plain `average`.
        average_large: the merge is the average as far as the updates are large for the base.
        precision: `full`: as accurate as float32 products and a float64 eigendecomposition are; `auto`: where the
            weights are stored in 16 bits, no more accurate than their rounding asks for (`matrix.budget`).
        combine_copies: count an expert and its exact copies as one of their summed weight.

    Raises:
        ValueError: a value is out of its range.
    """

    second_moment: SecondMoment
    gate: Gate | None = None
    structural_prior: bool = False
    refinement: SpectralRefinement | None = None
    bounds: Bounds = field(default_factory=Bounds)
    correlation_threshold: float = 0.0
    uncorrelated: Literal["balanced", "average"] = "average"
    average_large: bool = False
    combine_copies: bool = False
    precision: Precision = "full"

    def __post_init__(self) -> None:
        if not 0 <= self.correlation_threshold <= 1:
            raise ValueError(f"correlation_threshold must lie in [0, 1]; got {self.correlation_threshold!r}")

    @property
    def needs_agreement(self) -> bool:
        """Whether some part asks for `T_eff`, the number of independent updates."""
        return self.bounds.length != "none" or (self.refinement is not None and self.refinement.by_disagreement)

    @property
    def needs_size(self) -> bool:
        """Whether some part asks how large the updates are for their base."""
        return "by_size" in (self.bounds.retention, self.bounds.length) or self.average_large

    @property
    def needs_rank(self) -> bool:
        """Whether some part asks for the share of the updates that is of low rank."""
        return self.bounds.length != "none" or self.correlation_threshold > 0

    @property
    def needs_moment_norms(self) -> bool:
        """Whether some part asks for the Frobenius norm of each second moment."""
        return self.second_moment.epsilon == "auto" or self.correlation_threshold > 0 or self.bounds.asks_for_retention
