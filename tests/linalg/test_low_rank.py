"""Low rank is found where it is, down to the tolerance, and nowhere else."""

import pytest
import torch

from mergekit_ace.linalg.low_rank import orthonormal_factors
from tests.linalg.matrices import of_rank


@pytest.mark.parametrize(("shape", "rank"), [((300, 200), 16), ((200, 300), 40), ((256, 256), 1)])
def test_factors_of_a_low_rank_matrix(shape: tuple[int, int], rank: int) -> None:
    matrix = of_rank(*shape, rank)
    found = orthonormal_factors(matrix.clone(), most=60, tolerance=1e-12)
    assert found is not None
    basis, rows = found
    assert rank <= basis.shape[1] <= 60
    torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64))
    assert torch.linalg.norm(basis @ rows - matrix) <= 1e-12


def test_what_lies_below_the_tolerance_is_left_out() -> None:
    noise = 1e-6 * of_rank(200, 200, 200, seed=5)
    matrix = of_rank(200, 200, 10) + noise
    size = float(torch.linalg.norm(noise))
    found = orthonormal_factors(matrix.clone(), most=40, tolerance=2 * size)
    assert found is not None
    assert torch.linalg.norm(found[0] @ found[1] - matrix) <= 2 * size
    assert orthonormal_factors(matrix.clone(), most=40, tolerance=size / 10) is None


def test_a_matrix_of_full_rank_has_none() -> None:
    generator = torch.Generator().manual_seed(0)
    assert orthonormal_factors(torch.randn(200, 200, generator=generator), most=40, tolerance=1e-6) is None


def test_a_rank_beyond_the_useful_one_is_refused() -> None:
    assert orthonormal_factors(of_rank(200, 200, 50), most=40, tolerance=1e-12) is None


def test_the_same_matrix_gives_the_same_factors() -> None:
    matrix = of_rank(120, 90, 8)
    first = orthonormal_factors(matrix.clone(), most=20, tolerance=1e-12)
    torch.manual_seed(99)
    second = orthonormal_factors(matrix.clone(), most=20, tolerance=1e-12)
    assert first is not None
    assert second is not None
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
