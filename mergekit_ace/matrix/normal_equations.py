"""The weight that interferes least with every expert, by its normal equations.

    X (sum_t a_t Sbar_t + P) = sum_t a_t N_t Sbar_t,    Sbar_t = scale_t G_t + ridge_t I

`G_t` is the Gram matrix of the (centered) task vector, `N_t` the (centered) task vector, `a_t` the expert's share and
`P` the collective structural prior (ACE, arXiv:2603.02945, Eqs. 11-14). Four routes, equal in exact arithmetic:
`dense` forms the `[n, n]` system and the numerator, `from_reference` the system and the numerator of what the experts
differ by, `matrix_weights` the system and its parts, `stacked_rows` the `[q, q]` one of the `q < n` rows that all task
vectors have together.
Each is assembled first; whether it is worth solving is known before it is factorized.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from mergekit_ace.linalg.precision import inner_products
from mergekit_ace.linalg.symmetric import gram
from mergekit_ace.matrix.bounds import mean_energy
from mergekit_ace.matrix.refinement import Refinement
from mergekit_ace.matrix.second_moment import RegularizedMoment
from mergekit_ace.matrix.task_vectors import TaskVectors


class NormalEquations(Protocol):
    """The assembled equations of one matrix."""

    moments: tuple[RegularizedMoment, ...]
    """Each expert's scale and ridge."""
    correlation: float | None
    """How far the experts' second moments correlate (`moment_correlation`), where a threshold asks for it."""

    def solve(self) -> Solution:
        """Factorize and solve; consumes what was assembled.

        Raises:
            FactorizationError: no reasonable jitter makes the system positive definite.
        """


@dataclass(frozen=True, kw_only=True)
class Solution:
    """The preliminary merge of one matrix and what its making measured."""

    weight: Tensor
    """`W0`, `[m, n]`."""
    residual: Tensor | None
    """`R = sum_t a_t D_t (S_t - Sm)`, `[m, n]`, when asked for; `Sm` is the mean of the regularized `Sbar_t`."""
    condition: float | None
    """Estimated condition number of `sum_t a_t Sbar_t`; None unless `diagnostics` are wanted."""
    column_basis: Tensor | None = None
    """`[m, p]`, orthonormal columns that span the columns of `weight` and `residual`; None where nothing is known."""
    products: str | None = None
    """Dtype of the factors of products that have fewer digits than the working dtype; None: none has."""
    error: float = 0.0
    """Estimated `||.||_F` of the error that those add to `weight`."""
    response: Response | None = None
    """Where a bound of the retention asks for it."""


class Response(Protocol):
    """`<X, N>` of a merged task vector and the numerator `N = sum_t a_t N_t Sbar_t`."""

    def __call__(self, merged: Tensor, refinement: Refinement | None) -> Tensor:
        """`<X, N>`, float64, on the device of `X`: the host waits for it together with other numbers.

        Args:
            merged: `X`, the preliminary merge and its refinement.
            refinement: what was added; None: nothing.
        """


def response_to(numerator: Tensor) -> Response:
    """By the numerator itself, `[m, n]`."""

    def response(merged: Tensor, refinement: Refinement | None) -> Tensor:
        return inner_products([(merged, numerator)])[0]

    return response


def response_by_system(system: Tensor) -> Response:
    """Of a solve whose numerator is not kept: `N = W0 A` gives `tr(W0^T W0 A)`, and `tr(R^T W0 A)` of the refinement.

    `R = level U_k V_k^T` of `W0 = U diag(s) V^T` gives `R^T W0 = level V_k diag(s) V_k^T`.

    Args:
        system: `A = sum_t a_t Sbar_t`, `[n, n]`, of a matrix with `m >= n` whose `W0` is what is refined.
    """

    def response(merged: Tensor, refinement: Refinement | None) -> Tensor:
        if refinement is None or refinement.triples is None:
            return inner_products([(gram(merged), system)])[0]
        triples = refinement.triples
        squared = triples.gram if triples.gram is not None else gram(merged - refinement.update)
        through = (system @ triples.right).mul_(triples.right).double().sum(dim=0) * triples.singular_values
        return inner_products([(squared, system)])[0] + refinement.level * through.sum()

    return response


def retention(response: float, moments: Sequence[RegularizedMoment], shares: Sequence[float]) -> float:
    """Mean response of a merged task vector `X` under the experts' second moments, relative to their own.

        sum_t a_t <X, D_t>_t / sum_t a_t <D_t, D_t>_t,    <X, Y>_t = tr(X Sbar_t Y^T)

    1 for every expert in its own matrix; 1 minus the smallest objective, relative to that of the base, for `W0`; more
    than 1 for what responds more strongly than the experts do.

    Args:
        response: `<X, sum_t a_t N_t Sbar_t>`, of the merged task vector and the numerator (`Response`).
        moments: with their squared norms, or responses.
        shares: `a_t`.
    """
    own = sum(share * moment.own_response for moment, share in zip(moments, shares, strict=True))
    return response / own if own > 0 else 0.0


def add_prior_(unprimed: Tensor, prior_through: Tensor, ones: Tensor | None = None) -> Tensor:
    """`B (A + 1 c)^-1` from `Z = B A^-1` and `u = c A^-1`: `Z - (Z 1) u / (1 + u 1)`, Sherman-Morrison, in place.

    `u 1` cannot be negative: `A` is the matrix that `c` is the mean row of plus a ridge, so the denominator is >= 1.

    Args:
        unprimed: `Z`, `[m, n]`.
        prior_through: `u`, `[n]`.
        ones: coordinates of `1`, where the others are coordinates too.
    """
    if ones is None:
        along = unprimed.sum(dim=1) / (1 + prior_through.sum())
    else:
        along = unprimed @ ones / (1 + prior_through @ ones)
    return unprimed.addr_(along, prior_through, alpha=-1)


def prior_scale(task_vectors: TaskVectors, *, normalize: bool) -> float:
    """Factor of the mean row of the summed second moments: `1 / mean_t(a_t e_t)` when normalized, else 1."""
    if not normalize:
        return 1.0
    return 1 / mean_energy(task_vectors)
