"""The normal equations by the rows of the task vectors, where those are fewer than the layer's inputs (Woodbury).

With the rows `Y_t` of every expert scaled by the root of its weight in the system and stacked to `Y`, `[q, n]`,

    A = rho I + Y^T Y,    Y A^-1 = (rho I + Y Y^T)^-1 Y,

so that whatever is a combination of the rows, `J Y`, is solved by a `[q, q]` Cholesky factor alone, without the
cancellation of the general formula `A^-1 = (I - Y^T (rho I + Y Y^T)^-1 Y) / rho`. Only mean rows need that one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_ace.layer.agreement import moment_correlation
from mergekit_ace.layer.branch import Branch
from mergekit_ace.layer.diagnostics import diagnostics_wanted
from mergekit_ace.layer.options import CovarianceOptions
from mergekit_ace.layer.row_factors import ExpertRows, RowFactors
from mergekit_ace.layer.solution import Solution, add_prior_, prior_scale, regularize
from mergekit_ace.layer.task_vectors import TaskVectors
from mergekit_ace.linalg.cholesky import cholesky_factor, solve_right
from mergekit_ace.linalg.conditioning import largest_eigenvalue
from mergekit_ace.linalg.precision import squared_norm
from mergekit_ace.linalg.symmetric import add_to_diagonal_, gram


def solve_stacked_rows(
    task_vectors: TaskVectors, factors: RowFactors, options: CovarianceOptions, branch: Branch
) -> Solution:
    """Solve in the `q` dimensions of the stacked rows.

    Beyond the inputs at most two `[q, q]`, one `[q, n]`, two `[m, q]` and three `[m, n]` working-dtype buffers are
    alive at once; `q < n`.

    Args:
        task_vectors: at least one expert.
        factors: their rows; overwritten.
        options: as in `solve`.
        branch: as in `solve`.
    """
    rows, experts = factors.rows, factors.experts
    inner = gram(rows.mT)
    regularized = tuple(
        regularize(task_vectors, t, options, branch, gram_side=inner[rows_t.block, rows_t.block])
        for t, rows_t in enumerate(experts)
    )
    shares = task_vectors.shares
    ridges = [share * proxy.ridge for share, proxy in zip(shares, regularized, strict=True)]
    ridge = sum(ridges)
    # Full shrinkage leaves an expert's rows no weight in the system, yet they stay in the numerator: give them one that
    # is far below the rounding of the ridge instead of dividing by zero.
    least = torch.finfo(rows.dtype).eps ** 2 * ridge
    weights = [
        max(share * proxy.scale, least / proxy.trace) if proxy.trace > 0 else 0.0
        for share, proxy in zip(shares, regularized, strict=True)
    ]
    scaling = torch.cat(
        [
            rows.new_full((len(rows[rows_t.block]), 1), weight**0.5)
            for rows_t, weight in zip(experts, weights, strict=True)
        ]
    )
    rows.mul_(scaling)
    inner.mul_(scaling).mul_(scaling.mT)
    correlation = None
    if options.correlation_threshold > 0:
        # `||Y^T Y||_F = ||Y Y^T||_F`
        correlation = moment_correlation(
            regularized, shares, summed_squared_norm=squared_norm(inner), dimensions=rows.shape[1]
        )
    # A task vector is its basis times `units[t]` times its scaled rows.
    units = [weight**-0.5 if weight > 0 else 0.0 for weight in weights]

    # sum_t a_t C_t Sbar_t = sum_t U_t (a_t scale_t G_t + a_t ridge_t I) Y_t
    numerator = rows.new_empty((task_vectors.shape[0], len(rows)))
    for rows_t, unit, own in zip(experts, units, ridges, strict=True):
        block = inner[rows_t.block, rows_t.block] * unit
        numerator[:, rows_t.block] = _expand(rows_t, add_to_diagonal_(block, own * unit))
    residual = _residual(task_vectors, factors, inner, units, ridge) if branch.with_residual else None

    factor = cholesky_factor(add_to_diagonal_(inner, ridge), what=task_vectors.name)
    del inner
    weight_matrix = solve_right(numerator, factor) @ rows
    whole_numerator = numerator @ rows if options.retention_bound else None
    del numerator
    if not options.center_numerator and options.center_second_moment:
        row = _weighted_mean_rows(experts, ridges)
        for rows_t in experts:
            row += (_mean_row(rows_t) @ rows[rows_t.block].mT) @ rows[rows_t.block]
        inside = solve_right((row @ rows.mT)[None], factor) @ rows
        weight_matrix.add_((row - inside[0]) / ridge)
    if options.structural_prior:
        along = rows.sum(dim=1)[None] * (prior_scale(task_vectors, normalize=branch.normalize) / rows.shape[1])
        add_prior_(weight_matrix, (solve_right(along, factor) @ rows)[0])
    # The q < n rows leave directions in which only the ridge acts, so it is the smallest eigenvalue.
    condition = largest_eigenvalue(factor) / ridge if diagnostics_wanted() else None
    return Solution(
        weight=weight_matrix,
        residual=residual,
        regularized=regularized,
        condition=condition,
        correlation=correlation,
        column_basis=_column_basis(experts, task_vectors.shape),
        numerator=whole_numerator,
    )


def _residual(
    task_vectors: TaskVectors, factors: RowFactors, inner: Tensor, units: list[float], ridge: float
) -> Tensor:
    """`R = sum_t a_t D_t S_t - (1/T) (sum_t a_t D_t) A` with `A = ridge I + Y^T Y`: `[m, q]` columns times the rows."""
    rows, experts, shares = factors.rows, factors.experts, task_vectors.shares
    count = len(task_vectors)
    columns = rows.new_zeros((task_vectors.shape[0], len(rows)))
    for rows_t, unit, share in zip(experts, units, shares, strict=True):
        own = inner[rows_t.block, rows_t.block]
        columns[:, rows_t.block] += _expand(rows_t, add_to_diagonal_(own * unit, -ridge * share * unit / count))
        columns.sub_(_expand(rows_t, inner[rows_t.block] * (share * unit / count)))
    residual = columns @ rows
    if experts[0].mean_row is not None:
        row = torch.zeros_like(rows[0])
        for rows_t in experts:
            row += (_mean_row(rows_t) @ rows[rows_t.block].mT) @ rows[rows_t.block]
        mean = _weighted_mean_rows(experts, shares)
        residual.add_(row - (ridge * mean + (mean @ rows.mT) @ rows) / count)
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
