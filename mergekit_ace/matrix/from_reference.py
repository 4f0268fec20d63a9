"""The merge as one expert and what the others differ from it by, for tall and square matrices.

    X = D_r + (sum_{t != r} (D_t - D_r) a_t Sbar_t) (sum_s a_s Sbar_s)^-1

The same solution of the normal equations with one product less: the expert `r` is a term without one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from mergekit_ace.linalg.cholesky import cholesky_factor, solve_right
from mergekit_ace.linalg.conditioning import condition_number
from mergekit_ace.linalg.precision import squared_norm
from mergekit_ace.linalg.symmetric import add_to_diagonal_
from mergekit_ace.matrix.decision import Decision
from mergekit_ace.matrix.diagnostics import diagnostics_wanted
from mergekit_ace.matrix.normal_equations import NormalEquations, Solution, response_by_system
from mergekit_ace.matrix.options import CovarianceOptions
from mergekit_ace.matrix.second_moment import RegularizedMoment, moment_correlation, regularize
from mergekit_ace.matrix.task_vectors import TaskVectors


@dataclass(kw_only=True)
class _FromReference:
    """`X = D_r + numerator system^-1`."""

    name: str
    system: Tensor
    """`sum_t a_t Sbar_t`, `[n, n]`."""
    numerator: Tensor
    """`sum_{t != r} (D_t - D_r) a_t Sbar_t`, `[m, n]`."""
    task_vectors: TaskVectors
    reference: int
    keep_response: bool
    moments: tuple[RegularizedMoment, ...]
    correlation: float | None

    def solve(self) -> Solution:
        """As `NormalEquations.solve`."""
        factor = cholesky_factor(self.system, what=self.name)
        condition = condition_number(factor) if diagnostics_wanted() else None
        weight = solve_right(self.numerator, factor)
        for rows in self.task_vectors.row_panels():
            weight[rows].add_(self.task_vectors.rows(self.reference, rows))
        return Solution(
            weight=weight,
            residual=None,
            condition=condition,
            response=response_by_system(self.system) if self.keep_response else None,
        )


def assemble_from_reference(
    task_vectors: TaskVectors, options: CovarianceOptions, decision: Decision
) -> NormalEquations:
    """Accumulate the system and the numerator one expert at a time.

    Until they are solved, and whatever the number of experts, at most three `[n, n]` and four `[m, n]` working-dtype
    buffers are alive at once beyond the inputs.

    Args:
        task_vectors: at least one expert, as `suits` has it.
        options: which second moment, which ridge.
        decision: whether second moments are divided by their traces.
    """
    m, n = task_vectors.buffer_shape
    system, numerator = task_vectors.zeros(n, n), task_vectors.zeros(m, n)
    shares = task_vectors.shares
    reference = _reference(task_vectors, decision)
    moments = []
    for t, share in enumerate(shares):
        own = task_vectors.gram(t)
        squared = squared_norm(own) if options.needs_moment_norms else None
        moment = regularize(task_vectors, t, options, decision, squared=squared)
        moments.append(moment)
        system.add_(own.mul_(share * moment.scale))
        if t == reference:
            continue
        add_to_diagonal_(own, share * moment.ridge)
        task_vectors.add_apart_times_(numerator, t, reference, own)
    correlation = None
    if options.correlation_threshold > 0:
        correlation = moment_correlation(
            moments, shares, summed_squared_norm=squared_norm(system), dimensions=task_vectors.shape[1]
        )
    ridge = sum(share * moment.ridge for share, moment in zip(shares, moments, strict=True))
    return _FromReference(
        name=task_vectors.name,
        system=add_to_diagonal_(system, ridge),
        numerator=numerator,
        task_vectors=task_vectors,
        reference=reference,
        keep_response=options.bounds.asks_for_retention,
        moments=tuple(moments),
        correlation=correlation,
    )


def _reference(task_vectors: TaskVectors, decision: Decision) -> int:
    """The expert that leaves the products, and so their rounding, the smallest; the same in any order of experts."""
    energies, shares = task_vectors.energies, task_vectors.shares
    traces = [1.0] * len(shares) if decision.trace_normalized else energies
    weights = [(share * trace) ** 2 for share, trace in zip(shares, traces, strict=True)]
    total = math.fsum(weights)
    # sum_{t != r} w_t (e_t + e_r), without what does not depend on r
    return min(range(len(shares)), key=lambda r: ((total - 2 * weights[r]) * energies[r], -shares[r]))


def suits(task_vectors: TaskVectors, options: CovarianceOptions, decision: Decision) -> bool:
    """Whether a merge is the plain solution of the normal equations, of a matrix that is not wide."""
    m, n = task_vectors.buffer_shape
    plain = not (options.second_moment.centered or options.structural_prior or decision.refined_residual)
    return plain and m >= n
