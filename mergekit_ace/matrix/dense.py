"""The normal equations by their `[n, n]` matrix: products, Cholesky, two triangular solves."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mergekit_ace.linalg.cholesky import cholesky_factor, solve_right
from mergekit_ace.linalg.conditioning import condition_number
from mergekit_ace.linalg.precision import squared_norm
from mergekit_ace.linalg.symmetric import add_gram_upper_, add_to_diagonal_, gram, mirror_upper_
from mergekit_ace.matrix.decision import Decision
from mergekit_ace.matrix.diagnostics import diagnostics_wanted
from mergekit_ace.matrix.normal_equations import NormalEquations, Solution, add_prior_, prior_scale, response_to
from mergekit_ace.matrix.options import CovarianceOptions
from mergekit_ace.matrix.second_moment import RegularizedMoment, moment_correlation, regularize
from mergekit_ace.matrix.task_vectors import TaskVectors


@dataclass(kw_only=True)
class DenseEquations:
    """`X (system + P) = numerator`, with the prior's row where there is one."""

    name: str
    system: Tensor
    """`sum_t a_t Sbar_t`, `[n, n]`; deleted once it is factorized."""
    numerator: Tensor
    prior_row: Tensor | None
    ones: Tensor | None
    """Coordinates of the column of ones, of cores."""
    residual: Tensor | None
    keep_numerator: bool
    moments: tuple[RegularizedMoment, ...]
    correlation: float | None

    def solve(self) -> Solution:
        """As `NormalEquations.solve`."""
        factor = cholesky_factor(self.system, what=self.name)
        del self.system
        condition = condition_number(factor) if diagnostics_wanted() else None
        weight = solve_right(self.numerator, factor)
        if self.prior_row is not None:
            add_prior_(weight, solve_right(self.prior_row[None], factor)[0], self.ones)
        return Solution(
            weight=weight,
            residual=self.residual,
            condition=condition,
            response=response_to(self.numerator) if self.keep_numerator else None,
        )


def assemble_dense(task_vectors: TaskVectors, options: CovarianceOptions, decision: Decision) -> NormalEquations:
    """Accumulate the normal equations one expert at a time.

    Until they are solved, and whatever the number of experts, at most three `[n, n]` and six `[m, n]` working-dtype
    buffers are alive at once beyond the inputs.

    Args:
        task_vectors: at least one expert.
        options: which second moment, which ridge, prior or not.
        decision: whether second moments are divided by their traces, and the residual is wanted.
    """
    m, n = task_vectors.buffer_shape
    wide, centered = m < n, options.second_moment.centered
    system, numerator = task_vectors.zeros(n, n), task_vectors.zeros(m, n)
    ridge_part = task_vectors.zeros(m, n) if decision.refined_residual else numerator
    total = task_vectors.zeros(m, n) if decision.refined_residual else None
    # What centering takes from the residual travels as a vector: the outer product with 1_m is added once, at the end.
    residual_row = task_vectors.zeros(n)
    moments: list[RegularizedMoment] = []

    for t, share in enumerate(task_vectors.shares):
        rows = task_vectors.task_vector(t)
        if total is not None:
            total.add_(rows, alpha=share)
        mean_row = task_vectors.mean_row(rows) if centered else None
        if mean_row is not None:
            task_vectors.add_to_every_row_(rows, mean_row, factor=-1)
        smaller = gram(rows.mT if wide else rows)
        squared = squared_norm(smaller) if options.needs_moment_norms else None
        moment = regularize(task_vectors, t, options, decision, squared=squared)
        moments.append(moment)
        weight = share * moment.scale
        if wide:
            add_gram_upper_(system, rows, scale=weight)
            numerator.addmm_(smaller, rows, alpha=weight)
        else:
            system.add_(smaller, alpha=weight)
            numerator.addmm_(rows, smaller, alpha=weight)
        ridge_part.add_(rows, alpha=share * moment.ridge)
        if mean_row is not None and total is not None:
            residual_row.add_((mean_row @ rows.mT) @ rows, alpha=weight)
        del rows, smaller

    if wide:
        mirror_upper_(system)
    correlation = None
    if options.correlation_threshold > 0:
        correlation = moment_correlation(
            moments, task_vectors.shares, summed_squared_norm=squared_norm(system), dimensions=task_vectors.shape[1]
        )
    prior_row = None
    if options.structural_prior:
        prior_row = _mean_row_of(system, task_vectors)
        prior_row.mul_(prior_scale(task_vectors, normalize=decision.trace_normalized))
    ridge = sum(share * moment.ridge for share, moment in zip(task_vectors.shares, moments, strict=True))
    add_to_diagonal_(system, ridge)

    residual = None
    if total is not None:
        residual = task_vectors.add_to_every_row_(numerator.clone(), residual_row)
        residual.addmm_(total, system, alpha=-1 / len(task_vectors))
        del total
        numerator.add_(ridge_part)
    return DenseEquations(
        name=task_vectors.name,
        system=system,
        numerator=numerator,
        prior_row=prior_row,
        ones=None if task_vectors.coordinates is None else task_vectors.coordinates.ones_right,
        residual=residual,
        keep_numerator=options.bounds.asks_for_retention,
        moments=tuple(moments),
        correlation=correlation,
    )


def _mean_row_of(system: Tensor, task_vectors: TaskVectors) -> Tensor:
    """The mean of the `n` rows of a symmetric matrix, `[n]`."""
    if task_vectors.coordinates is None:
        return system.mean(dim=0)
    return (task_vectors.coordinates.ones_right @ system).div_(task_vectors.shape[1])
