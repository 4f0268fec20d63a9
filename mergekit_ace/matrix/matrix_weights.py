"""The merge as a mean whose weights are matrices, for few experts of tall matrices.

    X = sum_t D_t B_t,    B_t = a_t Sbar_t (sum_s a_s Sbar_s)^-1,    sum_t B_t = I
      = D_r + sum_{t != r} (D_t - D_r) B_t

The same solution of the normal equations, in another order: the system is solved for the `[n, n]` weights and not for
the `[m, n]` numerator, which is never formed. One expert `r` is a term without a product, and the products multiply
what the experts disagree by, with weights of norm 1 or so: nothing amplifies their rounding. In float32 the error is a
third of that of solving for the numerator. Where factors are rounded to bfloat16, a multiple of the identity, `p_t`, is
taken out of the weights before:

    (D_t - D_r) B_t = p_t (D_t - D_r) + (D_t - D_r) (B_t - p_t I)

The first term is exact, and the second one half to three quarters as large as both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mergekit_ace.linalg import bfloat16
from mergekit_ace.linalg.cholesky import cholesky_factor, solve_right
from mergekit_ace.linalg.conditioning import condition_number
from mergekit_ace.linalg.precision import squared_norm, squared_norms
from mergekit_ace.linalg.symmetric import add_to_diagonal_
from mergekit_ace.matrix import from_reference, rough_moments
from mergekit_ace.matrix.budget import FOLLOWING, PRODUCTS, error_budget
from mergekit_ace.matrix.decision import Decision
from mergekit_ace.matrix.diagnostics import diagnostics_wanted
from mergekit_ace.matrix.normal_equations import NormalEquations, Solution, response_by_system
from mergekit_ace.matrix.options import CovarianceOptions
from mergekit_ace.matrix.second_moment import RegularizedMoment, moment_correlation, regularize
from mergekit_ace.matrix.task_vectors import TaskVectors
from mergekit_ace.matrix.workload import by_matrix_weights


@dataclass(kw_only=True)
class _MatrixWeights:
    """`X = D_r + sum_{t != r} (D_t - D_r) a_t Sbar_t system^-1`."""

    task_vectors: TaskVectors
    system: Tensor
    """`sum_t a_t Sbar_t`, `[n, n]`."""
    weighted: list[Tensor]
    """`a_t Sbar_t` of every expert, `[n, n]`; empty once they are used."""
    error: float
    """`||.||_F` that products with factors in bfloat16 may be wrong by; 0: all are in the working dtype."""
    of_moments: float
    """`||.||_F` that second moments in bfloat16 may add to the merge; 0: they are in the working dtype."""
    in_full: Callable[[], NormalEquations]
    """The same equations with second moments in the working dtype."""
    keep_response: bool
    moments: tuple[RegularizedMoment, ...]
    correlation: float | None

    def solve(self) -> Solution:
        """As `NormalEquations.solve`."""
        task_vectors = self.task_vectors
        factor = cholesky_factor(self.system, what=task_vectors.name)
        error = 0.0
        if self.of_moments > 0:
            error = rough_moments.estimated_error(task_vectors, self.moments, factor)
            if error > self.of_moments:
                self.weighted = []
                del factor
                equations = self.in_full()
                self.moments, self.correlation = equations.moments, equations.correlation
                return equations.solve()
        condition = condition_number(factor) if diagnostics_wanted() else None
        # The same expert in any order of them: the one that weighs most.
        strength = [
            share * moment.scale * moment.trace for share, moment in zip(task_vectors.shares, self.moments, strict=True)
        ]
        reference = max(range(len(strength)), key=lambda t: (strength[t], task_vectors.energies[t]))
        weight = task_vectors.task_vector(reference)
        # Errors of the products add up by their squares.
        allowed = self.error / math.sqrt(max(1, len(task_vectors) - 1))
        weighted, self.weighted = self.weighted, []
        weighted.reverse()
        for t in range(len(task_vectors)):
            own = weighted.pop()
            if t == reference:
                continue
            weights = solve_right(own, factor)
            del own
            apart = _Differences(task_vectors, t, reference)
            estimate = None
            if allowed > 0:
                estimate = _add_rough_product_(weight, apart, weights, allowed)
            if estimate is None:
                for rows, panel in apart:
                    weight[rows].addmm_(panel, weights)
            else:
                error = math.hypot(error, estimate)
            del weights
        return Solution(
            weight=weight,
            residual=None,
            condition=condition,
            products="bfloat16" if error > 0 else None,
            error=error,
            response=response_by_system(self.system) if self.keep_response else None,
        )


class _Differences:
    """`D_t - D_r` in pieces of its rows, as often as it is gone through."""

    def __init__(self, task_vectors: TaskVectors, t: int, reference: int) -> None:
        self.task_vectors, self.t, self.reference = task_vectors, t, reference

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        for rows in self.task_vectors.row_panels():
            yield rows, self.task_vectors.apart(self.t, self.reference, rows)

    def sizes(self) -> bfloat16.FactorSizes:
        """Of the columns, from some of the rows."""
        height = self.task_vectors.buffer_shape[0]
        rows = slice(None, None, bfloat16.row_step(height))
        sample = self.task_vectors.apart(self.t, self.reference, rows)
        return bfloat16.FactorSizes.of_columns([sample]).times(height / len(sample))


def _add_rough_product_(target: Tensor, apart: _Differences, weights: Tensor, allowed: float) -> float | None:
    """Add `apart @ weights` with factors in bfloat16, and estimate the error, `||.||_F`; None: it is above `allowed`.

    Nothing is added then.
    """
    columns = apart.sizes()
    # The multiple of the identity that leaves the least.
    total = float(columns.squares.sum())
    level = float(columns.squares @ torch.diagonal(weights).double()) / total if total > 0 else 0.0
    weights = add_to_diagonal_(weights.clone(), -level)
    squared = columns.error_with(bfloat16.FactorSizes.of_rows(weights))
    if squared > allowed**2:
        return None
    rounded = weights.bfloat16()
    for rows, panel in apart:
        product = bfloat16.product(panel, rounded).to(target.dtype)
        squared += bfloat16.ROUNDING**2 * float(product.square().sum())
        target[rows].add_(panel, alpha=level).add_(product)
    return math.sqrt(squared)


def assemble_matrix_weights(
    task_vectors: TaskVectors, options: CovarianceOptions, decision: Decision, *, rough: bool = True
) -> NormalEquations:
    """Assemble the system, and keep every expert's part of it.

    Until they are solved at most `T + 4` `[n, n]`, one `[m, n]` and three working-dtype buffers of some of its rows
    (`panels`) are alive at once beyond the inputs.

    Args:
        task_vectors: at least one expert, as `suits` has it.
        options: which second moment, which ridge.
        decision: whether second moments are divided by their traces.
        rough: second moments may be rounded to bfloat16 where the error of the output allows it.
    """
    shares = task_vectors.shares
    allowed = rough_moments.allowed_error(task_vectors, options, decision) if rough else 0.0
    weighted = [task_vectors.gram(t, rough=allowed > 0) for t in range(len(shares))]
    squares: list[float] | list[None] = [None] * len(shares)
    if options.needs_moment_norms:
        squares = squared_norms(weighted).tolist()
    moments = tuple(
        regularize(task_vectors, t, options, decision, squared=squared) for t, squared in enumerate(squares)
    )
    if allowed > 0 and not rough_moments.is_below_the_ridge(moments, shares, task_vectors.shape[1]):
        del weighted
        return assemble_matrix_weights(task_vectors, options, decision, rough=False)
    system = torch.zeros_like(weighted[0])
    for own, share, moment in zip(weighted, shares, moments, strict=True):
        system.add_(own.mul_(share * moment.scale))
    correlation = None
    if options.correlation_threshold > 0:
        correlation = moment_correlation(
            moments, shares, summed_squared_norm=squared_norm(system), dimensions=task_vectors.shape[1]
        )
    for own, share, moment in zip(weighted, shares, moments, strict=True):
        add_to_diagonal_(own, share * moment.ridge)
        add_to_diagonal_(system, share * moment.ridge)
    return _MatrixWeights(
        task_vectors=task_vectors,
        system=system,
        weighted=weighted,
        error=allowed_error(task_vectors, options) * (math.sqrt(0.5) if allowed > 0 else 1.0),
        of_moments=allowed,
        in_full=partial(assemble_matrix_weights, task_vectors, options, decision, rough=False),
        keep_response=options.bounds.asks_for_retention,
        moments=moments,
        correlation=correlation,
    )


def suits(task_vectors: TaskVectors, options: CovarianceOptions, decision: Decision) -> bool:
    """Whether a merge can be a mean of matrix weights, and has the least arithmetic then."""
    if not from_reference.suits(task_vectors, options, decision):
        return False
    m, n = task_vectors.buffer_shape
    return by_matrix_weights(m, n, len(task_vectors), halved=allowed_error(task_vectors, options) > 0)


def allowed_error(task_vectors: TaskVectors, options: CovarianceOptions) -> float:
    """`||.||_F` that products with factors in bfloat16 may be wrong by; 0 where they are no faster, or too wrong.

    With roundings of `u` and `||B_t - p_t I||_F^2` of about `n a_t / (2 T)`, as weights have that add up to the
    identity,

        ||error||_F^2 = u^2 sum_{t != r} (e_t + e_r) a_t / T

    is known before anything is multiplied: weights are rounded, and the product, the differences hardly.
    """
    m, n = task_vectors.buffer_shape
    if not bfloat16.is_faster(task_vectors.device, m, n):
        return 0.0
    *others, (largest, _) = sorted(zip(task_vectors.energies, task_vectors.shares, strict=True))
    squared: float = math.fsum(share * (energy + largest) for energy, share in others) / len(task_vectors)
    allowed = PRODUCTS * error_budget(task_vectors, options.precision) / FOLLOWING
    return allowed if bfloat16.ROUNDING * math.sqrt(squared) <= allowed else 0.0
