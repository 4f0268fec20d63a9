"""The weight that interferes least with every expert, by its normal equations.

    X (sum_t a_t Sbar_t + P) = sum_t a_t N_t Sbar_t,    Sbar_t = scale_t G_t + ridge_t I

`G_t` is the Gram matrix of the (centered) task vector, `N_t` the (centered) task vector, `a_t` the expert's share and
`P` the collective structural prior (ACE, arXiv:2603.02945, Eqs. 11-14).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mergekit_ace.layer.diagnostics import diagnostics_wanted
from mergekit_ace.layer.options import CovarianceOptions
from mergekit_ace.layer.ridge import Regularized, fixed_ridge, shrunk_ridge
from mergekit_ace.layer.task_vectors import TaskVectors
from mergekit_ace.linalg.cholesky import cholesky_factor, solve_right
from mergekit_ace.linalg.conditioning import condition_number
from mergekit_ace.linalg.precision import squared_norm
from mergekit_ace.linalg.symmetric import add_gram_upper_, add_to_diagonal_, gram, mirror_upper_


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


def solve(task_vectors: TaskVectors, options: CovarianceOptions, *, normalize: bool, with_residual: bool) -> Solution:
    """Accumulate the normal equations one expert at a time, and solve them.

    Beyond the inputs and whatever the number of experts, at most three `[n, n]` and six `[m, n]` working-dtype buffers
    are alive at once.

    Args:
        task_vectors: at least one expert.
        options: which second moment, which numerator, which ridge, prior or not.
        normalize: divide each second moment by its trace; every expert's must be positive then.
        with_residual: also compute `R`, for spectral refinement.
    """
    m, n = task_vectors.shape
    new = task_vectors.base.new_zeros
    dtype = task_vectors.dtype
    system = new((n, n), dtype=dtype)
    numerator = new((m, n), dtype=dtype)
    ridge_part = new((m, n), dtype=dtype) if with_residual else numerator
    total = new((m, n), dtype=dtype) if with_residual else None
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
        proxy = _regularize(task_vectors, t, options, normalize=normalize, squared=squared_norm(smaller))
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
        if normalize:
            prior_row = prior_row / _mean_energy(task_vectors)
        weight_matrix = _add_prior(weight_matrix, solve_right(prior_row[None], factor))
    return Solution(weight=weight_matrix, residual=residual, regularized=tuple(regularized), condition=condition)


def _regularize(
    task_vectors: TaskVectors, t: int, options: CovarianceOptions, *, normalize: bool, squared: float
) -> Regularized:
    measured = task_vectors.statistics[t]
    m, n = task_vectors.shape
    trace = measured.centered_energy if options.center_second_moment else measured.energy
    if trace == 0 and (normalize or options.epsilon == "auto"):
        return Regularized(scale=0.0, ridge=0.0, trace=0.0)
    if options.epsilon == "auto":
        samples = m - 1 if options.center_second_moment else m
        return shrunk_ridge(trace=trace, squared_norm=squared, samples=samples, dimensions=n, normalize=normalize)
    return fixed_ridge(options.epsilon, trace=trace, normalize=normalize)


def _mean_energy(task_vectors: TaskVectors) -> float:
    weighted = zip(task_vectors.shares, task_vectors.energies, strict=True)
    return sum(share * energy for share, energy in weighted) / len(task_vectors)


def _add_prior(unprimed: Tensor, prior_through: Tensor) -> Tensor:
    """`B (A + 1 c)^-1` from `Z = B A^-1` and `u = c A^-1`: `Z - (Z 1) u / (1 + u 1)`, Sherman-Morrison, in place.

    `u 1` cannot be negative: `A` is the matrix that `c` is the mean row of plus a ridge, so the denominator is >= 1.
    """
    along = unprimed.sum(dim=1) / (1 + prior_through.sum())
    return unprimed.addr_(along, prior_through[0], alpha=-1)
