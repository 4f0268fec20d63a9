"""Positive definite systems: exact answers, forced failures, and what is said of them."""

import re
from pathlib import Path

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
    with pytest.raises(FactorizationError) as raised:
        cholesky_factor(matrix, what="layers.3.q_proj")
    # Of the mean diagonal, 2.5 / 3, times the unit of float32 and ten to the fifth.
    assert str(raised.value) == (
        "layers.3.q_proj: a (3, 3) system must be positive definite; it is not, even with 9.9e-03 on its diagonal "
        "(mean 8.3e-01). Raise epsilon."
    )


@pytest.mark.parametrize("power", [1, 2, 3, 4, 5])
def test_the_smallest_jitter_that_helps_is_added(power: int) -> None:
    """Ten times the unit of rounding of the mean diagonal, and ten times as much up to five times."""
    unit = torch.finfo(torch.float32).eps
    matrix = torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.5 * 10**power * unit]))
    level = float(matrix.diagonal().abs().mean())
    told = rf"^q: not positive definite in torch\.float32; {level * unit * 10**power:.1e} was added to its diagonal "
    with pytest.warns(
        RuntimeWarning, match=re.escape(f"(mean {level:.1e}). A larger epsilon avoids this.") + "$"
    ) as seen:
        factor = cholesky_factor(matrix, what="q")
    assert re.match(told, str(seen[0].message))
    # Of the caller, not of the line that warns.
    assert Path(seen[0].filename).name != "cholesky.py"
    torch.testing.assert_close(factor @ factor.T, matrix + level * unit * 10**power * torch.eye(4))


def test_nan_is_an_error_and_not_a_jitter() -> None:
    matrix = torch.eye(3)
    matrix[1, 1] = float("nan")
    with pytest.raises(FactorizationError) as raised:
        cholesky_factor(matrix, what="q_proj")
    assert str(raised.value) == "q_proj: a (3, 3) system must be finite to be solved; got NaN or infinity"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [512, 513, 1100, 1543])
def test_a_large_matrix_is_factorized_by_blocks_as_exactly_as_a_small_one(size: int, dtype: torch.dtype) -> None:
    matrix = spd(size, condition=1e3).to(dtype)
    matrix = (matrix + matrix.T) / 2
    kept = matrix.clone()
    factor = cholesky_factor(matrix, what="system")
    assert torch.equal(matrix, kept)
    assert torch.equal(factor, factor.tril())
    assert bool((factor.diagonal() > 0).all())
    residual = (factor.double() @ factor.double().T - matrix.double()).norm() / matrix.double().norm()
    assert residual < torch.finfo(dtype).eps * 8
    assert factor.dtype == dtype


@pytest.mark.parametrize("place", [0, 511, 550, 1099])
def test_a_large_matrix_is_indefinite_wherever_its_pivot_is(place: int) -> None:
    matrix = torch.eye(1100)
    matrix[place, place] = -0.5
    with pytest.raises(FactorizationError, match=r"^q: a \(1100, 1100\) system must be positive definite"):
        cholesky_factor(matrix, what="q")


@pytest.mark.parametrize("place", [0, 1099])
def test_nan_anywhere_in_a_large_matrix_is_an_error(place: int) -> None:
    matrix = torch.eye(1100)
    matrix[place, place] = float("nan")
    with pytest.raises(FactorizationError, match="must be finite"):
        cholesky_factor(matrix, what="q")
