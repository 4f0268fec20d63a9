"""The normal equations by the rows of the task vectors, where those are fewer than the layer's inputs (Woodbury).

With the rows `Y_t` of every expert scaled by the root of its weight in the system and stacked to `Y`, `[q, n]`,

    A = rho I + Y^T Y,    Y A^-1 = (rho I + Y Y^T)^-1 Y,

so that whatever is a combination of the rows, `J Y`, is solved by a `[q, q]` Cholesky factor alone, without the
cancellation of the general formula `A^-1 = (I - Y^T (rho I + Y Y^T)^-1 Y) / rho`.

The rows are kept as they are and the scaling beside them: in bfloat16 the rows of task vectors are exact, those of
scaled ones are not. For products in bfloat16 of task vectors that are rows, a multiple of the task vector is taken out
of each block of coefficients: that part is exact, and the other one smaller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_ace.linalg import bfloat16
from mergekit_ace.linalg.cholesky import cholesky_factor, solve_right
from mergekit_ace.linalg.conditioning import largest_eigenvalue
from mergekit_ace.linalg.precision import inner_products, squared_norm, squared_norms
from mergekit_ace.linalg.symmetric import add_to_diagonal_, gram
from mergekit_ace.matrix.budget import FOLLOWING, PRODUCTS, error_budget
from mergekit_ace.matrix.decision import Decision
from mergekit_ace.matrix.diagnostics import diagnostics_wanted
from mergekit_ace.matrix.normal_equations import (
    NormalEquations,
    Response,
    Solution,
    add_prior_,
    prior_scale,
    response_to,
)
from mergekit_ace.matrix.options import CovarianceOptions
from mergekit_ace.matrix.refinement import Refinement
from mergekit_ace.matrix.row_factors import ExpertRows, RowFactors
from mergekit_ace.matrix.second_moment import RegularizedMoment, moment_correlation, regularize
from mergekit_ace.matrix.task_vectors import TaskVectors

# Above this ratio of the ridge to the mean eigenvalue of `Y_t Y_t^T` of some expert, `K - ridge J` loses digits.
_LARGE_RIDGE = 30.0


@dataclass(kw_only=True)
class _StackedRows:
    """`X = numerator (ridge I + Y Y^T)^-1 Y`, and the prior's row where there is one, with `Y = diag(scaling) rows`."""

    name: str
    inner: Tensor
    """`Y Y^T`, `[q, q]`; deleted once it is factorized."""
    rows: Tensor
    """`[q, n]`."""
    scaling: Tensor
    """`[q]`."""
    experts: tuple[ExpertRows, ...]
    numerator: Tensor
    """`[m, q]`, columns of `Y`."""
    ridge: float
    prior_scale: float | None
    residual: Tensor | None
    column_basis: Tensor | None
    error: float
    """`||.||_F` that a product with factors in bfloat16 may be wrong by; 0: it is in the working dtype."""
    keep_numerator: bool
    by_coefficients: bool
    """What is refined is the preliminary merge, which has no prior, and the ridge is large for no expert."""
    moments: tuple[RegularizedMoment, ...]
    correlation: float | None

    def _response(self, coefficients: Tensor) -> Response:
        """`<X, N>`, with `N = K Y` never formed.

        The solve gives `J Y Y^T = K - ridge J` for `X = J Y`, so `X N^T = (K - ridge J) K^T`. What refinement adds is
        `level U_k diag(1/s) U_k^T X`, hence

            <X, N> = ||K||^2 - ridge <J, K>,    <level U_k V_k^T, N> = level sum_i <u_i^T (K - ridge J), u_i^T K> / s_i
        """
        if not self.by_coefficients:
            return response_to((self.numerator * self.scaling) @ self.rows)
        numerator, ridge, column_basis = self.numerator, self.ridge, self.column_basis
        # A sum of so many terms that the rounding of each does not matter.
        multiply = bfloat16.product if self.error > 0 else torch.matmul

        def response(merged: Tensor, refinement: Refinement | None) -> Tensor:
            own, with_coefficients = inner_products([(numerator, numerator), (coefficients, numerator)])
            found: Tensor = own - ridge * with_coefficients
            if refinement is None or refinement.triples is None:
                return found
            left = refinement.triples.left if column_basis is None else column_basis @ refinement.triples.left
            ours = multiply(left.mT, numerator).to(numerator.dtype)
            through = ours - ridge * multiply(left.mT, coefficients).to(numerator.dtype)
            each = (ours.double() * through.double()).sum(dim=1) / refinement.triples.singular_values
            return found + refinement.level * each.sum()

        return response

    def solve(self) -> Solution:
        """As `NormalEquations.solve`."""
        factor = cholesky_factor(add_to_diagonal_(self.inner, self.ridge), what=self.name)
        del self.inner
        coefficients = solve_right(self.numerator, factor)
        weight, error = None, 0.0
        if self.error > 0:
            weight, error = self._rough_weight(coefficients * self.scaling)
        if weight is None:
            weight = (coefficients * self.scaling) @ self.rows
        if self.prior_scale is not None:
            along = (self.rows.sum(dim=1) * self.scaling)[None] * (self.prior_scale / self.rows.shape[1])
            add_prior_(weight, ((solve_right(along, factor) * self.scaling) @ self.rows)[0])
        return Solution(
            weight=weight,
            residual=self.residual,
            # The q < n rows leave directions in which only the ridge acts, so it is the smallest eigenvalue.
            condition=largest_eigenvalue(factor) / self.ridge if diagnostics_wanted() else None,
            column_basis=self.column_basis,
            products="bfloat16" if error > 0 else None,
            error=error,
            response=self._response(coefficients) if self.keep_numerator else None,
        )

    def _rough_weight(self, coefficients: Tensor) -> tuple[Tensor | None, float]:
        """`coefficients @ rows` with factors in bfloat16, and its estimated error; None, 0: that is above `error`.

        Args:
            coefficients: `[m, q]`; overwritten.
        """
        sizes = self.rows.square().sum(dim=1)
        levels = []
        for rows_t in self.experts:
            if rows_t.basis is None:
                diagonal = torch.diagonal(coefficients[:, rows_t.block])
                # The multiple that leaves the least.
                level = float((diagonal * sizes[rows_t.block]).sum() / sizes[rows_t.block].sum())
                diagonal.sub_(level)
                levels.append((rows_t.block, level))
        product, error = bfloat16.product_within(coefficients, self.rows, self.error)
        if product is None:
            return None, 0.0
        weight = product.to(self.rows.dtype)
        for block, level in levels:
            weight.add_(self.rows[block], alpha=level)
        return weight, error


def assemble_stacked_rows(
    task_vectors: TaskVectors, factors: RowFactors, options: CovarianceOptions, decision: Decision
) -> NormalEquations:
    """Assemble in the `q` dimensions of the stacked rows.

    Until they are solved at most two `[q, q]`, one `[q, n]`, two `[m, q]` and three `[m, n]` working-dtype buffers are
    alive at once beyond the inputs; `q < n`.

    Args:
        task_vectors: at least one expert.
        factors: their rows.
        options: which second moment, which ridge, prior or not.
        decision: whether second moments are divided by their traces, and the residual is wanted.
    """
    rows, experts = factors.rows, factors.experts
    inner = gram(rows.mT)
    squares: list[float] | list[None] = [None] * len(experts)
    if options.needs_moment_norms:
        own_blocks = [inner[rows_t.block, rows_t.block] for rows_t in experts]
        squares = squared_norms(own_blocks).tolist()
    moments = tuple(
        regularize(task_vectors, t, options, decision, squared=squared) for t, squared in enumerate(squares)
    )
    shares = task_vectors.shares
    ridges = [share * moment.ridge for share, moment in zip(shares, moments, strict=True)]
    ridge = sum(ridges)
    # Full shrinkage leaves an expert's rows no weight in the system, yet they stay in the numerator: give them one that
    # is far below the rounding of the ridge instead of dividing by zero.
    least = torch.finfo(rows.dtype).eps ** 2 * ridge
    weights = [
        max(share * moment.scale, least / moment.trace) if moment.trace > 0 else 0.0
        for share, moment in zip(shares, moments, strict=True)
    ]
    scaling = torch.cat(
        [
            rows.new_full((rows_t.block.stop - rows_t.block.start,), weight**0.5)
            for rows_t, weight in zip(experts, weights, strict=True)
        ]
    )
    inner.mul_(scaling[:, None]).mul_(scaling)
    correlation = None
    if options.correlation_threshold > 0:
        # `||Y^T Y||_F = ||Y Y^T||_F`
        correlation = moment_correlation(
            moments, shares, summed_squared_norm=squared_norm(inner), dimensions=rows.shape[1]
        )
    large_ridge = any(
        ridge * (rows_t.block.stop - rows_t.block.start) > _LARGE_RIDGE * weight * moment.trace
        for rows_t, weight, moment in zip(experts, weights, moments, strict=True)
    )
    # A task vector is its basis times `units[t]` times its scaled rows.
    units = [weight**-0.5 if weight > 0 else 0.0 for weight in weights]

    # sum_t a_t N_t Sbar_t = sum_t U_t (a_t scale_t G_t + a_t ridge_t I) Y_t
    numerator = rows.new_empty((task_vectors.shape[0], len(rows)))
    for rows_t, unit, own in zip(experts, units, ridges, strict=True):
        block = inner[rows_t.block, rows_t.block] * unit
        numerator[:, rows_t.block] = _expand(rows_t, add_to_diagonal_(block, own * unit))
    return _StackedRows(
        name=task_vectors.name,
        residual=_residual(task_vectors, factors, inner, scaling, units, ridge) if decision.refined_residual else None,
        inner=inner,
        rows=rows,
        scaling=scaling,
        experts=experts,
        numerator=numerator,
        ridge=ridge,
        prior_scale=prior_scale(task_vectors, normalize=decision.trace_normalized)
        if options.structural_prior
        else None,
        column_basis=_column_basis(experts, task_vectors.shape),
        error=_allowed_error(task_vectors, len(rows), options),
        keep_numerator=options.bounds.asks_for_retention,
        by_coefficients=not (options.structural_prior or decision.refined_residual or large_ridge),
        moments=moments,
        correlation=correlation,
    )


def _allowed_error(task_vectors: TaskVectors, height: int, options: CovarianceOptions) -> float:
    """`||.||_F` that `J Y` may be wrong by, of `height` rows, before refinement; 0 where bfloat16 is no faster."""
    device, (m, n) = task_vectors.device, task_vectors.shape
    if not bfloat16.is_faster(device, m, height, n):
        return 0.0
    return PRODUCTS * error_budget(task_vectors, options.precision) / FOLLOWING


def _residual(
    task_vectors: TaskVectors, factors: RowFactors, inner: Tensor, scaling: Tensor, units: list[float], ridge: float
) -> Tensor:
    """`R = sum_t a_t D_t S_t - (1/T) (sum_t a_t D_t) A` with `A = ridge I + Y^T Y`: `[m, q]` columns times the rows."""
    rows, experts, shares = factors.rows, factors.experts, task_vectors.shares
    count = len(task_vectors)
    columns = rows.new_zeros((task_vectors.shape[0], len(rows)))
    for rows_t, unit, share in zip(experts, units, shares, strict=True):
        own = inner[rows_t.block, rows_t.block]
        columns[:, rows_t.block] += _expand(rows_t, add_to_diagonal_(own * unit, -ridge * share * unit / count))
        columns.sub_(_expand(rows_t, inner[rows_t.block] * (share * unit / count)))
    residual = columns.mul_(scaling) @ rows
    if experts[0].mean_row is not None:
        row = torch.zeros_like(rows[0])
        for rows_t in experts:
            block = rows[rows_t.block]
            row += ((_mean_row(rows_t) @ block.mT) * scaling[rows_t.block].square()) @ block
        mean = _weighted_mean_rows(experts, shares)
        residual.add_(row - (ridge * mean + ((mean @ rows.mT) * scaling.square()) @ rows) / count)
    return residual


def _expand(rows_t: ExpertRows, block: Tensor) -> Tensor:
    return block if rows_t.basis is None else rows_t.basis @ block


def _mean_row(rows_t: ExpertRows) -> Tensor:
    assert rows_t.mean_row is not None
    return rows_t.mean_row


def _weighted_mean_rows(experts: Sequence[ExpertRows], weights: Sequence[float]) -> Tensor:
    total = torch.zeros_like(_mean_row(experts[0]))
    for rows_t, weight in zip(experts, weights, strict=True):
        total.add_(_mean_row(rows_t), alpha=weight)
    return total


def _column_basis(experts: Sequence[ExpertRows], shape: tuple[int, int]) -> Tensor | None:
    """Orthonormal columns that span the experts' and the column of ones, which the mean rows need."""
    bases = [rows_t.basis for rows_t in experts if rows_t.basis is not None]
    if len(bases) < len(experts):
        return None
    ones = bases[0].new_ones((shape[0], 1))
    stacked = torch.cat([*bases, ones], dim=1)
    return torch.linalg.qr(stacked).Q if stacked.shape[1] < min(shape) else None
