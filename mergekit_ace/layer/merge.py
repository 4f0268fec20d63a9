"""One layer's merge: gate, solve, refine."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mergekit_ace.layer.agreement import effective_experts
from mergekit_ace.layer.bounds import longest_allowed, shortening
from mergekit_ace.layer.branch import choose_branch
from mergekit_ace.layer.normal_equations import solve
from mergekit_ace.layer.options import CovarianceOptions
from mergekit_ace.layer.refinement import Refinement, spectral_refinement
from mergekit_ace.layer.ridge import Regularized, relative_ridge
from mergekit_ace.layer.task_vectors import TaskVectors
from mergekit_ace.linalg.precision import squared_norm


@dataclass(frozen=True, kw_only=True)
class LayerMerge:
    """A merged task vector and how it came about.

    Attributes:
        task_vector: `[m, n]`, working dtype; add it to the base.
        heterogeneity: the statistic, None where a single expert or none carries information.
        heterogeneous: what the gate said.
        normalized: second moments were divided by their traces.
        regularized: scale and ridge of each expert in `TaskVectors.experts`; empty when nothing was solved.
        ridge: of the system, relative to the mean eigenvalue of what it regularizes; None when nothing was solved.
        ridge_is_fixed: a person set it; otherwise it was estimated.
        condition: estimated condition number of the system; None unless `diagnostics` are wanted.
        refinement: level and number of the refined directions, None when there was none.
        effective_experts: how many independent updates the experts' amount to; None where no option asks for it.
        low_rank: the experts' updates are of low rank; None where no option asks for it.
        retention: of the experts' own outputs, before any shortening; None where no option asks for it.
        shortening: what the bounds of retention and length multiplied the whole by, in `(0, 1]`.
        correlation: of the experts' second moments; None where no option asks for it.
        uncorrelated: they correlate too little to weigh the experts by; the layer was averaged.
    """

    task_vector: Tensor
    heterogeneity: float | None = None
    heterogeneous: bool = False
    normalized: bool = False
    regularized: tuple[Regularized, ...] = ()
    ridge: float | None = None
    ridge_is_fixed: bool = False
    condition: float | None = None
    refinement: Refinement | None = None
    effective_experts: float | None = None
    low_rank: bool | None = None
    retention: float | None = None
    shortening: float = 1.0
    correlation: float | None = None
    uncorrelated: bool = False

    def describe(self) -> str:
        """The facts above in one line, for a log."""
        if self.heterogeneity is None:
            return ""
        if self.uncorrelated:
            return f"second moments correlate by {self.correlation:.2g} only, averaged"
        gate = "heterogeneous" if self.heterogeneous else "homogeneous"
        line = f"{gate} ({self.heterogeneity:.3g})"
        if self.ridge is not None:
            line += f", ridge {self.ridge:.2g} of the mean eigenvalue"
        if self.condition is not None:
            line += f", condition {self.condition:.1e}"
        if self.refinement is not None:
            line += f", {self.refinement.directions} directions refined by {self.refinement.level:.3g}"
        if self.effective_experts is not None:
            line += f", {self.effective_experts:.2g} independent experts"
        if self.low_rank:
            line += ", low rank"
        if self.shortening < 1:
            line += f", shortened to {self.shortening:.2f}"
        return line


def merge_by_covariance(task_vectors: TaskVectors, options: CovarianceOptions) -> LayerMerge:
    """Merge one weight matrix by second-order proxies of the experts' inputs (ACE, arXiv:2603.02945, Eqs. 5-19).

    Experts without information in the layer were left out by `TaskVectors`. With none left the merged task vector is
    zero, with one it is that expert's, exactly. Where every update is the same in all rows, it is their mean.

    Working memory beyond the inputs: `working_numbers`, whatever the number of experts. Of the refinement's ten squares
    of the smaller side eight are its eigendecomposition, in float64.

    Args:
        task_vectors: of one `[m, n]` weight.
        options: `CovarianceOptions()` is the published method.

    Raises:
        FactorizationError: no reasonable jitter makes the system positive definite.
    """
    if len(task_vectors) == 0:
        return LayerMerge(task_vector=task_vectors.base.new_zeros(task_vectors.shape, dtype=task_vectors.dtype))
    became = tuple(range(len(task_vectors)))
    if options.combine_copies:
        task_vectors, became = task_vectors.without_copies()
    if len(task_vectors) == 1:
        return LayerMerge(task_vector=task_vectors.task_vector(0))
    if options.center_second_moment and not any(measured.centered_energy for measured in task_vectors.statistics):
        # All rows of every update are equal: no second moment to weigh the experts by, and centering would lose them.
        return LayerMerge(task_vector=task_vectors.sum().div_(len(task_vectors)))
    branch = choose_branch(task_vectors, options)
    solution = solve(task_vectors, options, branch)
    if branch.low_rank and solution.correlation is not None and solution.correlation < options.correlation_threshold:
        return LayerMerge(
            task_vector=task_vectors.sum().div_(len(task_vectors)),
            heterogeneity=branch.heterogeneity,
            heterogeneous=branch.heterogeneous,
            correlation=solution.correlation,
            low_rank=True,
            uncorrelated=True,
        )
    independent = effective_experts(task_vectors) if options.asks_for_agreement else None
    merged, refinement = solution.weight, None
    if branch.refine:
        refinement = spectral_refinement(
            solution.residual.add_(merged) if solution.residual is not None else merged,
            options.spectral_fraction,
            scale=1 - 1 / independent if independent and options.refinement_scale == "disagreement" else 1.0,
            column_basis=solution.column_basis,
        )
    if refinement is not None:
        merged.add_(refinement.update)
    retention = solution.retention(merged, task_vectors.shares) if options.retention_bound else None
    factor = shortening(
        squared_norm(merged) ** 0.5,
        retention=retention,
        longest=longest_allowed(task_vectors, options, independent=independent, low_rank=bool(branch.low_rank)),
    )
    if factor < 1:
        merged.mul_(factor)
        refinement = refinement and refinement.times_(factor)
    return LayerMerge(
        task_vector=merged,
        heterogeneity=branch.heterogeneity,
        heterogeneous=branch.heterogeneous,
        normalized=branch.normalize,
        regularized=tuple(solution.regularized[place] for place in became),
        ridge=relative_ridge(solution.regularized, task_vectors.shares, task_vectors.shape[1]),
        ridge_is_fixed=options.epsilon != "auto",
        condition=solution.condition,
        refinement=refinement,
        effective_experts=independent,
        low_rank=branch.low_rank,
        retention=retention,
        shortening=factor,
        correlation=solution.correlation,
    )
