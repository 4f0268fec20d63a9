"""One matrix's merge: decide, assemble, solve, refine, bound."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from mergekit_ace.linalg.precision import squared_norms
from mergekit_ace.matrix import from_reference, matrix_weights
from mergekit_ace.matrix.balanced import merge_without_moments
from mergekit_ace.matrix.bounds import scale_factor
from mergekit_ace.matrix.budget import PRODUCTS, REFINEMENT, error_budget
from mergekit_ace.matrix.decision import Decision, decide
from mergekit_ace.matrix.dense import assemble_dense
from mergekit_ace.matrix.measured import assemble_measured
from mergekit_ace.matrix.normal_equations import NormalEquations, retention
from mergekit_ace.matrix.options import CovarianceOptions
from mergekit_ace.matrix.refinement import Refinement, spectral_refinement
from mergekit_ace.matrix.row_factors import row_factors
from mergekit_ace.matrix.second_moment import RegularizedMoment, relative_ridge
from mergekit_ace.matrix.stacked_rows import assemble_stacked_rows
from mergekit_ace.matrix.task_vectors import TaskVectors


@dataclass(frozen=True, kw_only=True)
class MergeFacts:
    """What the merge of one matrix recorded of itself, but for its tensors: the one source of logs and reports."""

    decision: Decision | None = None
    """What was decided before the solve; None where nothing had to be (a single expert, another method)."""
    ridge: float | None = None
    """Of the system, relative to the mean eigenvalue of what it regularizes; None when nothing was solved."""
    ridge_is_fixed: bool = False
    """A person set it; otherwise it was estimated."""
    condition: float | None = None
    """Estimated condition number of the system; None unless `diagnostics` are wanted."""
    refinement_norm: float | None = None
    """`||.||_F` of what spectral refinement added; None when there was none."""
    retention: float | None = None
    """Mean response under the experts' second moments relative to their own, before any scaling; None where no bound
    asks for it."""
    scale_factor: float = 1.0
    """What the bounds of retention and length multiplied the whole by, in `(0, 1]`."""
    correlation: float | None = None
    """Of the experts' second moments; None where no threshold asks for it."""
    products: str | None = None
    """Dtype of the factors of products that have fewer digits than the working dtype; None: none has."""
    eigendecomposition: str | None = None
    """Dtype of the refinement's, float32 or float64; None where there was none."""
    measured: int = 0
    """How many experts' second moments were measured."""
    averaged: float = 0.0
    """Share of the result that no second moment decided, from 0 to 1: 1 where updates of low rank correlate too little
    to weigh the experts by."""


@dataclass(frozen=True, kw_only=True)
class MatrixMerge(MergeFacts):
    """A merged task vector and how it came about."""

    task_vector: Tensor
    """`[m, n]`, working dtype; add it to the base."""
    moments: tuple[RegularizedMoment, ...] = ()
    """Scale and ridge of each expert in `TaskVectors.experts`; empty when nothing was solved."""
    refinement: Refinement | None = None
    """Level and number of the refined directions; None when there was none."""

    def facts(self) -> MergeFacts:
        """Without the tensors."""
        return MergeFacts(**{field.name: getattr(self, field.name) for field in fields(MergeFacts)})

    def times_(self, unit: float) -> MatrixMerge:
        """The merge of task vectors that were divided by `unit`, as that of the undivided ones; in place."""
        refinement = self.refinement and self.refinement.times_(unit)
        return replace(
            self,
            task_vector=self.task_vector.mul_(unit),
            refinement=refinement,
            refinement_norm=refinement.norm if refinement else None,
        )

    def describe(self) -> str:
        """The facts above in one line, for a log."""
        if self.decision is None:
            return ""
        if self.averaged == 1:
            return f"second moments correlate by {self.correlation:.2g} only, not used"
        facts = [f"{self.measured} second moments measured"] if self.measured else []
        if self.decision.heterogeneous is not None:
            gate = "heterogeneous" if self.decision.heterogeneous else "homogeneous"
            facts.append(f"{gate} ({self.decision.heterogeneity:.3g})")
        if self.ridge is not None:
            facts.append(f"ridge {self.ridge:.2g} of the mean eigenvalue")
        if self.condition is not None:
            facts.append(f"condition {self.condition:.1e}")
        if self.refinement is not None:
            refined = f"{self.refinement.directions} directions refined by {self.refinement.level:.3g}"
            facts.append(f"{refined} in {self.eigendecomposition}")
        if self.products is not None:
            facts.append(f"products in {self.products}")
        if self.decision.effective_experts is not None:
            facts.append(f"{self.decision.effective_experts:.2g} independent experts")
        if self.decision.low_rank:
            facts.append("low rank" if self.decision.low_rank == 1 else f"low rank {self.decision.low_rank:.0%}")
        if self.averaged:
            facts.append(f"{self.averaged:.0%} without second moments")
        if self.scale_factor < 1:
            facts.append(f"scaled by {self.scale_factor:.2f}")
        return ", ".join(facts)


def takes_measured(options: CovarianceOptions) -> bool:
    """Whether all that the options ask for is defined of measured second moments too, not of estimates only."""
    of_residual = options.refinement is not None and options.refinement.of == "residual"
    return not (options.second_moment.centered or options.structural_prior or of_residual)


def merge_by_covariance(task_vectors: TaskVectors, options: CovarianceOptions) -> MatrixMerge:
    """Merge one weight matrix by second moments of the experts' inputs (ACE, arXiv:2603.02945, Eqs. 5-19).

    Experts without information in the matrix were left out by `TaskVectors`. With none left the merged task vector is
    zero, with one it is that expert's, exactly. Where every update is the same in all rows, it is their mean.

    Working memory beyond the inputs: `working_numbers`, whatever the number of experts. Of the refinement's ten squares
    of the smaller side eight are its eigendecomposition, in float64.

    Args:
        task_vectors: of one `[m, n]` weight.
        options: one of `presets`, or a composition of one's own.

    Raises:
        FactorizationError: no reasonable jitter makes the system positive definite.
        ValueError: there are measured second moments, and the options ask for what is defined of estimates only.
    """
    if task_vectors.measured and not takes_measured(options):
        raise ValueError(
            f"{task_vectors.name}: measured second moments cannot be combined with preset: published or "
            "structural_prior: true, which are defined of estimated ones. Remove moments, or those"
        )
    if len(task_vectors) == 0:
        return MatrixMerge(task_vector=task_vectors.zeros(*task_vectors.buffer_shape))
    given, became = task_vectors, tuple(range(len(task_vectors)))
    if options.combine_copies:
        task_vectors, became = task_vectors.without_copies()
    if len(task_vectors) == 1:
        return MatrixMerge(task_vector=task_vectors.task_vector(0))
    if options.second_moment.centered and not any(measured.centered_energy for measured in task_vectors.statistics):
        # All rows of every update are equal: no second moment to weigh the experts by, and centering would lose them.
        return MatrixMerge(task_vector=task_vectors.mean())
    decision = decide(task_vectors, options)
    equations = assemble(task_vectors, options, decision)
    averaged = _averaged(equations.correlation, options.correlation_threshold) * (decision.low_rank or 0.0)
    if averaged == 1:
        return MatrixMerge(
            task_vector=_without_moments(task_vectors, options),
            decision=decision,
            correlation=equations.correlation,
            averaged=1.0,
        )
    solution, moments, correlation = equations.solve(), equations.moments, equations.correlation
    del equations  # and what it was assembled from
    merged, refinement = solution.weight, None
    if decision.refined_directions:
        budget = 0.0
        # Updates of low rank have directions that are rounding, on which float32 is lost.
        if options.precision != "full" and not decision.low_rank:
            budget = error_budget(task_vectors, options.precision)
        refinement = spectral_refinement(
            solution.residual.add_(merged) if solution.residual is not None else merged,
            decision.refined_directions,
            scale=decision.refinement_scale,
            column_basis=solution.column_basis,
            error=REFINEMENT * budget,
        )
        if solution.error > 0:
            follows = solution.error + refinement.follows(solution.error, task_vectors.buffer_shape)
            if follows > PRODUCTS * budget:
                # Steep spectra: the products are exact enough, and what refinement makes of their rounding is not.
                del solution, merged
                return merge_by_covariance(given, replace(options, precision="full"))
        merged.add_(refinement.update)
    kept, numbers = None, squared_norms([merged])
    if solution.response is not None:
        numbers = torch.cat([numbers, solution.response(merged, refinement)[None]])
    squared_length, *responses = numbers.tolist()
    if responses:
        kept = retention(responses[0], moments, task_vectors.shares)
    refinement = refinement and replace(refinement, triples=None)
    factor = scale_factor(
        squared_length**0.5,
        retention=kept,
        longest=decision.longest,
        held=decision.held,
        large=decision.large,
        retained=decision.retained,
    )
    if factor < 1:
        merged.mul_(factor)
        refinement = refinement and refinement.times_(factor)
    if options.average_large and decision.large > 0:
        task_vectors.add_mean_(merged.mul_(1 - decision.large), factor=decision.large)
    if averaged:
        merged.lerp_(_without_moments(task_vectors, options), averaged)
        refinement = refinement and refinement.times_(1 - averaged)
    return MatrixMerge(
        task_vector=merged,
        decision=decision,
        moments=tuple(moments[place] for place in became),
        ridge=relative_ridge(moments, task_vectors.shares, task_vectors.shape[1]),
        ridge_is_fixed=options.second_moment.epsilon != "auto",
        condition=solution.condition,
        refinement=refinement,
        refinement_norm=refinement.norm if refinement else None,
        products=solution.products or (refinement.products if refinement else None),
        eigendecomposition=refinement.precision if refinement else None,
        retention=kept,
        scale_factor=factor,
        correlation=correlation,
        measured=task_vectors.measured,
        averaged=averaged,
    )


def assemble(task_vectors: TaskVectors, options: CovarianceOptions, decision: Decision) -> NormalEquations:
    """Assemble the normal equations by the route that does the least arithmetic.

    Args:
        task_vectors: at least one expert.
        options: which second moment, which ridge, prior or not.
        decision: whether second moments are divided by their traces, and the residual is wanted.
    """
    if task_vectors.measured:
        return assemble_measured(task_vectors, options, decision)
    factors = row_factors(task_vectors, center=options.second_moment.centered, low_rank=decision.low_rank)
    if factors is not None:
        return assemble_stacked_rows(task_vectors, factors, options, decision)
    if matrix_weights.suits(task_vectors, options, decision):
        return matrix_weights.assemble_matrix_weights(task_vectors, options, decision)
    if from_reference.suits(task_vectors, options, decision):
        return from_reference.assemble_from_reference(task_vectors, options, decision)
    return assemble_dense(task_vectors, options, decision)


def _averaged(correlation: float | None, threshold: float) -> float:
    """Share that updates of low rank are merged without second moments: 1 below the threshold, 0 from twice that."""
    if correlation is None:
        return 0.0
    return min(1.0, max(0.0, 2 - correlation / threshold))


def _without_moments(task_vectors: TaskVectors, options: CovarianceOptions) -> Tensor:
    return merge_without_moments(task_vectors) if options.uncorrelated == "balanced" else task_vectors.mean()
