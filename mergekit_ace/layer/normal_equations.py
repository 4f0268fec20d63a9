"""The weight that interferes least with every expert, by its normal equations.

    X (sum_t a_t Sbar_t + P) = sum_t a_t N_t Sbar_t,    Sbar_t = scale_t G_t + ridge_t I

`G_t` is the Gram matrix of the (centered) task vector, `N_t` the (centered) task vector, `a_t` the expert's share and
`P` the collective structural prior (ACE, arXiv:2603.02945, Eqs. 11-14). Two routes, equal in exact arithmetic: `dense`
forms the `[n, n]` system, `stacked_rows` the `[q, q]` one of the `q < n` rows that all task vectors have together.
"""

from __future__ import annotations

from mergekit_ace.layer.branch import Branch
from mergekit_ace.layer.dense_system import solve_dense
from mergekit_ace.layer.options import CovarianceOptions
from mergekit_ace.layer.row_factors import row_factors
from mergekit_ace.layer.solution import Solution
from mergekit_ace.layer.stacked_rows import solve_stacked_rows
from mergekit_ace.layer.task_vectors import TaskVectors


def solve(task_vectors: TaskVectors, options: CovarianceOptions, branch: Branch) -> Solution:
    """Solve the normal equations by the route that does the least arithmetic.

    Args:
        task_vectors: at least one expert.
        options: which second moment, which numerator, which ridge, prior or not.
        branch: whether second moments are divided by their traces, and the residual is wanted.

    Raises:
        FactorizationError: no reasonable jitter makes the system positive definite.
    """
    factors = row_factors(task_vectors, center=options.center_second_moment)
    if factors is None:
        return solve_dense(task_vectors, options, branch)
    return solve_stacked_rows(task_vectors, factors, options, branch)
