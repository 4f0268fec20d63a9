"""Second moments in bfloat16, where what that does to the merge is within the error that the output allows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_ace.linalg import bfloat16
from mergekit_ace.linalg.random_draws import normal_numbers
from mergekit_ace.matrix.budget import FOLLOWING, PRODUCTS, error_budget
from mergekit_ace.matrix.decision import Decision
from mergekit_ace.matrix.options import CovarianceOptions
from mergekit_ace.matrix.second_moment import RegularizedMoment
from mergekit_ace.matrix.task_vectors import TaskVectors

# Rows over columns: of less tall matrices these products are a small part of the time, and the estimate often above.
_TALL = 2
# Of the largest update's norm: with less to spend, as with updates of more than half a percent of the weights, the
# estimate is above it.
_WORTH_A_TRY = 0.035
_PROBES = 8


def allowed_error(task_vectors: TaskVectors, options: CovarianceOptions, decision: Decision) -> float:
    """`||.||_F` that rounded second moments may add to a merge before refinement; 0: they are not to be rounded."""
    m, n = task_vectors.buffer_shape
    if m < _TALL * n or decision.low_rank or not bfloat16.is_faster(task_vectors.device, m, n):
        return 0.0
    budget = error_budget(task_vectors, options.precision)
    if budget < _WORTH_A_TRY * math.sqrt(max(task_vectors.energies)):
        return 0.0
    # The other half of its square is for the products that follow.
    return math.sqrt(0.5) * PRODUCTS * budget / FOLLOWING


def is_below_the_ridge(moments: Sequence[RegularizedMoment], shares: Sequence[float], n: int) -> bool:
    """Whether the rounding of second moments leaves their sum positive definite, and `estimated_error` its first order.

    The largest eigenvalue of the roundings, `2 ||.||_F / sqrt(n)` of a random symmetric matrix, is below half of the
    ridge.
    """
    ridge = math.fsum(share * moment.ridge for share, moment in zip(shares, moments, strict=True))
    return 2 * _rounding(moments, shares) / math.sqrt(n) < ridge / 2


def _rounding(moments: Sequence[RegularizedMoment], shares: Sequence[float]) -> float:
    """`||sum_t a_t scale_t dG_t||_F`."""
    squares = ((share * m.scale) ** 2 * (m.squared_norm or 0.0) for share, m in zip(shares, moments, strict=True))
    return bfloat16.ROUNDING * math.sqrt(math.fsum(squares))


def estimated_error(task_vectors: TaskVectors, moments: Sequence[RegularizedMoment], factor: Tensor) -> float:
    """`||.||_F` of what rounding each `G_t` to bfloat16 does to `X = sum_t a_t D_t Sbar_t A^-1`, to first order.

        dX = sum_t (D_t - X) a_t scale_t dG_t A^-1
        ||dX||^2 = u^2 sum_t (a_t scale_t)^2 ||G_t||^2 ||D_t - X||^2 ||A^-1||^2 / n^2

    for random roundings of `u`. `||D_t - X||^2` is taken as twice the energy of the largest update, and `||A^-1||` from
    a few random vectors of a fixed seed.

    Args:
        task_vectors: of the merge.
        moments: with their squared norms.
        factor: Cholesky factor of `A`.
    """
    n = factor.shape[0]
    probes = normal_numbers(n, _PROBES, like=factor)
    half = torch.linalg.solve_triangular(factor, probes, upper=False)
    whole = torch.linalg.solve_triangular(factor.mT, half, upper=True)
    inverse = float(whole.double().square().sum()) / _PROBES
    apart = 2 * max(task_vectors.energies)
    return _rounding(moments, task_vectors.shares) * math.sqrt(apart * inverse) / n
