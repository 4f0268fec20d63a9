"""The merge as a mean whose weights are matrices, for few experts of tall matrices.

    X = sum_t D_t B_t,    B_t = a_t Sbar_t (sum_s a_s Sbar_s)^-1,    sum_t B_t = I
      = D_r + sum_{t != r} (D_t - D_r) B_t

The same solution of the normal equations, in another order: the system is solved for the `[n, n]` weights and not for
the `[m, n]` numerator, which is never formed. One expert `r` is a term without a product, and the products multiply
what the experts disagree by, with weights of norm 1 or so: nothing amplifies their rounding. In float32 the error is a
third of that of solving for the numerator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_ace.linalg import bfloat16
from mergekit_ace.linalg.blocks import row_slices
from mergekit_ace.linalg.cholesky import cholesky_factor, solve_right
from mergekit_ace.linalg.conditioning import condition_number
from mergekit_ace.linalg.precision import inner_products, squared_norm, squared_norms
from mergekit_ace.linalg.symmetric import add_gram_upper_, add_to_diagonal_, gram, mirror_upper_
from mergekit_ace.matrix.budget import FOLLOWING, PRODUCTS, error_budget
from mergekit_ace.matrix.decision import Decision
from mergekit_ace.matrix.diagnostics import diagnostics_wanted
from mergekit_ace.matrix.expert import difference
from mergekit_ace.matrix.normal_equations import NormalEquations, Solution
from mergekit_ace.matrix.options import CovarianceOptions
from mergekit_ace.matrix.refinement import Refinement
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
    keep_response: bool
    moments: tuple[RegularizedMoment, ...]
    correlation: float | None

    def solve(self) -> Solution:
        """As `NormalEquations.solve`."""
        task_vectors = self.task_vectors
        factor = cholesky_factor(self.system, what=task_vectors.name)
        condition = condition_number(factor) if diagnostics_wanted() else None
        # The same expert in any order of them: the one that weighs most.
        strength = [
            share * moment.scale * moment.trace for share, moment in zip(task_vectors.shares, self.moments, strict=True)
        ]
        reference = max(range(len(strength)), key=lambda t: (strength[t], task_vectors.energies[t]))
        tensors = [expert.tensor for expert in task_vectors.experts]
        pieces = row_slices(*task_vectors.buffer_shape)
        weight = task_vectors.task_vector(reference)
        # Errors of the pieces add up by their squares.
        allowed = self.error / math.sqrt((len(tensors) - 1) * len(pieces))
        weighted, self.weighted = self.weighted, []
        weighted.reverse()
        error = 0.0
        for t, tensor in enumerate(tensors):
            own = weighted.pop()
            if t == reference:
                continue
            weights = solve_right(own, factor)
            del own
            for rows in pieces:
                apart = difference(tensor[rows], tensors[reference][rows], task_vectors.dtype)
                rough, estimate = None, 0.0
                if allowed > 0:
                    rough, estimate = bfloat16.product_within(apart, weights, allowed)
                if rough is None:
                    weight[rows].addmm_(apart, weights)
                else:
                    weight[rows].add_(rough)
                    error = math.hypot(error, estimate)
                del apart, rough
            del weights
        return Solution(
            weight=weight,
            residual=None,
            condition=condition,
            products="bfloat16" if error > 0 else None,
            error=error,
            response=self._response if self.keep_response else None,
        )

    def _response(self, merged: Tensor, refinement: Refinement | None) -> Tensor:
        """`<X, N>` with `N = W0 A`, as the solve has it: `tr(W0^T W0 A)`, and of what refinement adds `tr(R^T W0 A)`.

        `R = level U_k V_k^T` of `W0 = U diag(s) V^T` gives `R^T W0 = level V_k diag(s) V_k^T`.
        """
        if refinement is None or refinement.triples is None:
            return inner_products([(gram(merged), self.system)])[0]
        triples = refinement.triples
        squared = triples.gram if triples.gram is not None else gram(merged - refinement.update)
        through = (self.system @ triples.right).mul_(triples.right).double().sum(dim=0) * triples.singular_values
        return inner_products([(squared, self.system)])[0] + refinement.level * through.sum()


def assemble_matrix_weights(
    task_vectors: TaskVectors, options: CovarianceOptions, decision: Decision
) -> NormalEquations:
    """Assemble the system, and keep every expert's part of it.

    Until they are solved at most `T + 4` `[n, n]`, one `[m, n]` and three working-dtype buffers of some of its rows
    (`row_slices`) are alive at once beyond the inputs.

    Args:
        task_vectors: at least one expert, as `suits` has it.
        options: which second moment, which ridge.
        decision: whether second moments are divided by their traces.
    """
    shares = task_vectors.shares
    weighted = [_gram_of(task_vectors, t) for t in range(len(shares))]
    squares: list[float] | list[None] = [None] * len(shares)
    if options.needs_moment_norms:
        squares = squared_norms(weighted).tolist()
    moments = tuple(
        regularize(task_vectors, t, options, decision, squared=squared) for t, squared in enumerate(squares)
    )
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
        error=allowed_error(task_vectors, options),
        keep_response=options.bounds.retention,
        moments=moments,
        correlation=correlation,
    )


def _gram_of(task_vectors: TaskVectors, t: int) -> Tensor:
    """`D_t^T D_t`, `[n, n]`."""
    m, n = task_vectors.buffer_shape
    total = task_vectors.zeros(n, n)
    for rows in row_slices(m, n):
        add_gram_upper_(total, task_vectors.rows(t, rows), keep=0.0 if rows.start == 0 else 1.0)
    return mirror_upper_(total)


def suits(task_vectors: TaskVectors, options: CovarianceOptions, decision: Decision) -> bool:
    """Whether a merge can be a mean of matrix weights, and has the least arithmetic then."""
    m, n = task_vectors.buffer_shape
    plain = not (options.second_moment.centered or options.structural_prior or decision.refined_residual)
    return plain and by_matrix_weights(m, n, len(task_vectors), halved=allowed_error(task_vectors, options) > 0)


def allowed_error(task_vectors: TaskVectors, options: CovarianceOptions) -> float:
    """`||.||_F` that products with factors in bfloat16 may be wrong by; 0 where they are no faster, or too wrong.

    With roundings of `u` and `||B_t||_F^2` of about `n a_t / T`, as weights have that add up to the identity,

        ||error||_F^2 = 3 u^2 sum_{t != r} (e_t + e_r) a_t / T

    is known before anything is multiplied.
    """
    m, n = task_vectors.buffer_shape
    if options.precision == "full" or not bfloat16.is_faster(task_vectors.base.device, m, n):
        return 0.0
    allowed = PRODUCTS * error_budget(task_vectors, options.precision)
    *others, (largest, _) = sorted(zip(task_vectors.energies, task_vectors.shares, strict=True))
    squared: float = 3 * math.fsum(share * (energy + largest) for energy, share in others) / len(task_vectors)
    return allowed if FOLLOWING * bfloat16.ROUNDING * math.sqrt(squared) <= allowed else 0.0
