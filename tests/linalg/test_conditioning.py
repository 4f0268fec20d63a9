"""The condition number of a system from its Cholesky factor, against matrices whose spectrum is chosen."""

import pytest
import torch

from mergekit_ace.linalg.conditioning import condition_number

ROUNDING = 1e-3  # of the factor in float32
LANCZOS = 0.05  # 24 steps on an evenly spaced spectrum


def spd(eigenvalues: torch.Tensor) -> torch.Tensor:
    basis, _ = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), dtype=torch.float64))
    return (basis * eigenvalues) @ basis.T


@pytest.mark.parametrize("condition", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_exact_for_small_systems(condition: float, dtype: torch.dtype) -> None:
    matrix = spd(torch.linspace(1, condition, 12, dtype=torch.float64))
    factor = torch.linalg.cholesky(matrix).to(dtype)
    assert condition_number(factor) == pytest.approx(condition, rel=ROUNDING)


def test_is_close_from_below_for_large_systems() -> None:
    matrix = spd(torch.linspace(1e-3, 1, 200, dtype=torch.float64))
    estimate = condition_number(torch.linalg.cholesky(matrix))
    assert 1e3 * (1 - LANCZOS) < estimate <= 1e3 * (1 + 1e-9)


def test_a_multiple_of_the_identity_ends_the_iteration_early() -> None:
    assert condition_number(3 * torch.eye(50)) == pytest.approx(1.0, rel=1e-5)


def test_the_same_factor_gives_the_same_number() -> None:
    factor = torch.linalg.cholesky(spd(torch.logspace(0, 3, 60, dtype=torch.float64))).float()
    assert condition_number(factor) == condition_number(factor)
