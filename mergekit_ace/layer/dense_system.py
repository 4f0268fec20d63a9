"""The normal equations by their `[n, n]` matrix: products, Cholesky, two triangular solves."""

from __future__ import annotations

from mergekit_ace.layer.agreement import moment_correlation
from mergekit_ace.layer.branch import Branch
from mergekit_ace.layer.diagnostics import diagnostics_wanted
from mergekit_ace.layer.options import CovarianceOptions
from mergekit_ace.layer.ridge import Regularized
from mergekit_ace.layer.solution import Solution, add_prior_, prior_scale, regularize
from mergekit_ace.layer.task_vectors import TaskVectors
from mergekit_ace.linalg.cholesky import cholesky_factor, solve_right
from mergekit_ace.linalg.conditioning import condition_number
from mergekit_ace.linalg.precision import squared_norm
from mergekit_ace.linalg.symmetric import add_gram_upper_, add_to_diagonal_, gram, mirror_upper_


def solve_dense(task_vectors: TaskVectors, options: CovarianceOptions, branch: Branch) -> Solution:
    """Accumulate the normal equations one expert at a time, and solve them.

    Beyond the inputs and whatever the number of experts, at most three `[n, n]` and six `[m, n]` working-dtype buffers
    are alive at once.

    Args:
        task_vectors: at least one expert.
        options: which second moment, which numerator, which ridge, prior or not.
        branch: as in `solve`.
    """
    m, n = task_vectors.shape
    new = task_vectors.base.new_zeros
    dtype = task_vectors.dtype
    system = new((n, n), dtype=dtype)
    numerator = new((m, n), dtype=dtype)
    ridge_part = new((m, n), dtype=dtype) if branch.with_residual else numerator
    total = new((m, n), dtype=dtype) if branch.with_residual else None
    # Mean rows travel as vectors: the outer product with 1_m is added once, at the end.
    numerator_row, residual_row = new(n, dtype=dtype), new(n, dtype=dtype)
    regularized: list[Regularized] = []

    for t, share in enumerate(task_vectors.shares):
        rows = task_vectors.task_vector(t)
        mean_row = rows.mean(dim=0) if options.center_second_moment else None
        if total is not None:
            total.add_(rows, alpha=share)
        if mean_row is not None:
            rows.sub_(mean_row)
        wide = m < n
        smaller = gram(rows.mT if wide else rows)
        proxy = regularize(task_vectors, t, options, branch, gram_side=smaller)
        regularized.append(proxy)
        weight = share * proxy.scale
        if wide:
            add_gram_upper_(system, rows, scale=weight)
            numerator.addmm_(smaller, rows, alpha=weight)
        else:
            system.add_(smaller, alpha=weight)
            numerator.addmm_(rows, smaller, alpha=weight)
        ridge_part.add_(rows, alpha=share * proxy.ridge)
        if mean_row is not None:
            through = (mean_row @ rows.mT) @ rows
            residual_row.add_(through, alpha=weight)
            if not options.center_numerator:
                numerator_row.add_(through, alpha=weight).add_(mean_row, alpha=share * proxy.ridge)
        del rows, smaller

    if wide:
        mirror_upper_(system)
    correlation = None
    if options.correlation_threshold > 0:
        correlation = moment_correlation(
            regularized, task_vectors.shares, summed_squared_norm=squared_norm(system), dimensions=n
        )
    prior_row = system.mean(dim=0) if options.structural_prior else None
    ridge = sum(share * proxy.ridge for share, proxy in zip(task_vectors.shares, regularized, strict=True))
    add_to_diagonal_(system, ridge)

    residual = None
    if total is not None:
        residual = numerator.add(residual_row).addmm_(total, system, alpha=-1 / len(task_vectors))
        del total
        numerator.add_(ridge_part)
    del ridge_part
    numerator.add_(numerator_row)

    factor = cholesky_factor(system, what=task_vectors.name)
    del system
    condition = condition_number(factor) if diagnostics_wanted() else None
    weight_matrix = solve_right(numerator, factor)
    if prior_row is not None:
        prior_row.mul_(prior_scale(task_vectors, normalize=branch.normalize))
        add_prior_(weight_matrix, solve_right(prior_row[None], factor)[0])
    return Solution(
        weight=weight_matrix,
        residual=residual,
        regularized=tuple(regularized),
        condition=condition,
        correlation=correlation,
        numerator=numerator if options.retention_bound else None,
    )
