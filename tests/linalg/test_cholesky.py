"""Positive definite systems: exact answers, forced failures, and what is said of them."""

import pytest
import torch

from mergekit_ace.linalg.cholesky import FactorizationError, cholesky_factor, solve_right
from tests.linalg.matrices import spd


@pytest.mark.parametrize("condition", [1.0, 1e4, 1e10])
def test_solves_from_the_right(condition: float) -> None:
    matrix = spd(40, condition=condition)
    wanted = torch.randn(7, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    solved = solve_right(wanted @ matrix, cholesky_factor(matrix, what="system"))
    # A backward stable solve loses as many digits as the condition number has.
    assert torch.linalg.norm(solved - wanted) <= 1e-14 * condition * torch.linalg.norm(wanted)


def test_rounding_below_zero_is_lifted_and_said() -> None:
    matrix = spd(20, condition=10.0)
    values, vectors = torch.linalg.eigh(matrix)
    values[0] = -1e-15 * values[-1]
    indefinite = (vectors * values) @ vectors.T
    kept = indefinite.clone()
    with pytest.warns(RuntimeWarning, match="layers.3.q_proj: not positive definite"):
        factor = cholesky_factor(indefinite, what="layers.3.q_proj")
    torch.testing.assert_close(factor @ factor.T, indefinite, rtol=0, atol=1e-11)
    assert torch.equal(indefinite, kept)


def test_an_indefinite_system_is_an_error_that_names_it() -> None:
    matrix = torch.diag(torch.tensor([1.0, -0.5, 1.0]))
    with pytest.raises(FactorizationError, match=r"layers.3.q_proj.*positive definite.*Raise epsilon"):
        cholesky_factor(matrix, what="layers.3.q_proj")


def test_nan_is_an_error_and_not_a_jitter() -> None:
    matrix = torch.eye(3)
    matrix[1, 1] = float("nan")
    with pytest.raises(FactorizationError, match="must be finite"):
        cholesky_factor(matrix, what="q_proj")
