"""What solving a layer's normal equations gives, and the two small steps that both routes share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from mergekit_ace.layer.agreement import mean_energy
from mergekit_ace.layer.branch import Branch
from mergekit_ace.layer.options import CovarianceOptions
from mergekit_ace.layer.ridge import Regularized, fixed_ridge, shrunk_ridge
from mergekit_ace.layer.task_vectors import TaskVectors
from mergekit_ace.linalg.precision import inner_product, squared_norm


@dataclass(frozen=True, kw_only=True)
class Solution:
    """The preliminary merge of one layer and what its making measured."""

    weight: Tensor
    """`W0`, `[m, n]`."""
    residual: Tensor | None
    """`R = sum_t a_t D_t (S_t - Sm)`, `[m, n]`, when asked for; `Sm` is the mean of the regularized `Sbar_t`."""
    regularized: tuple[Regularized, ...]
    """Each expert's scale and ridge."""
    condition: float | None
    """Estimated condition number of `sum_t a_t Sbar_t`; None unless `diagnostics` are wanted."""
    correlation: float | None = None
    """How far the experts' second moments correlate (`moment_correlation`), where a threshold asks for it."""
    column_basis: Tensor | None = None
    """`[m, p]`, orthonormal columns that span the columns of `weight` and `residual`; None where nothing is known."""
    numerator: Tensor | None = None
    """`sum_t a_t D_t Sbar_t`, `[m, n]`, where a bound of the retention asks for it."""

    def retention(self, weight: Tensor, shares: Sequence[float]) -> float:
        """How much of the experts' own outputs a merged task vector `X` keeps, in the mean of the objective.

            sum_t a_t <X, D_t>_t / sum_t a_t <D_t, D_t>_t,    <X, Y>_t = tr(X Sbar_t Y^T)

        1 for every expert in its own layer; 1 minus the smallest objective, relative to that of the base, for `W0`;
        more than 1 for what answers louder than the experts do.

        Args:
            weight: `X`, `[m, n]`.
            shares: `a_t`.
        """
        assert self.numerator is not None
        own = 0.0
        for proxy, share in zip(self.regularized, shares, strict=True):
            assert proxy.squared_norm is not None
            own += share * (proxy.scale * proxy.squared_norm + proxy.ridge * proxy.trace)
        return inner_product(weight, self.numerator) / own if own > 0 else 0.0


def regularize(
    task_vectors: TaskVectors, t: int, options: CovarianceOptions, branch: Branch, *, gram_side: Tensor
) -> Regularized:
    """Scale and ridge of expert `t`.

    An expert whose rows are all equal has no centered second moment: where that would be divided by its trace, or its
    ridge taken from it, it is left out.

    Args:
        task_vectors: of the layer.
        t: which expert.
        options: fixed ridge or shrinkage.
        branch: whether to divide by the trace, and the least shrinkage.
        gram_side: `G_t` or the smaller `X_t X_t^T`, which has the same eigenvalues but for zeros.
    """
    measured = task_vectors.statistics[t]
    m, n = task_vectors.shape
    trace = measured.centered_energy if options.center_second_moment else measured.energy
    if trace == 0 and (branch.normalize or options.epsilon == "auto"):
        return Regularized(scale=0.0, ridge=0.0, trace=0.0, squared_norm=0.0)
    squared = squared_norm(gram_side) if options.asks_for_moment_norms else None
    if options.epsilon != "auto":
        return replace(fixed_ridge(options.epsilon, trace=trace, normalize=branch.normalize), squared_norm=squared)
    assert squared is not None
    samples = m - 1 if options.center_second_moment else m
    return shrunk_ridge(
        trace=trace,
        squared_norm=squared,
        samples=samples,
        dimensions=n,
        normalize=branch.normalize,
        least=branch.least_shrinkage,
    )


def add_prior_(unprimed: Tensor, prior_through: Tensor) -> Tensor:
    """`B (A + 1 c)^-1` from `Z = B A^-1` and `u = c A^-1`: `Z - (Z 1) u / (1 + u 1)`, Sherman-Morrison, in place.

    `u 1` cannot be negative: `A` is the matrix that `c` is the mean row of plus a ridge, so the denominator is >= 1.

    Args:
        unprimed: `Z`, `[m, n]`.
        prior_through: `u`, `[n]`.
    """
    along = unprimed.sum(dim=1) / (1 + prior_through.sum())
    return unprimed.addr_(along, prior_through, alpha=-1)


def prior_scale(task_vectors: TaskVectors, *, normalize: bool) -> float:
    """Factor of the mean row of the summed second moments: `1 / mean_t(a_t e_t)` when normalized, else 1."""
    if not normalize:
        return 1.0
    return 1 / mean_energy(task_vectors)
