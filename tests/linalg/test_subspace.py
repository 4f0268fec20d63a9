"""Singular subspaces against the full float64 SVD: projectors are compared, not vectors, whose signs are arbitrary."""

import pytest
import torch
from torch import Tensor

from mergekit_ace.linalg.subspace import (
    dominant_subspace,
    isometry_error,
    polar_factor,
    rounding_floor,
    singular_triples,
)
from tests.linalg.matrices import of_spectrum

SHAPES = pytest.mark.parametrize("shape", [(12, 30), (30, 12), (20, 20), (1, 9), (9, 1)], ids=str)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
# float64 steps throughout, rounded to the dtype once.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}


def steep(shape: tuple[int, int]) -> Tensor:
    """Three orders of magnitude, as task vectors have."""
    return of_spectrum(*shape, torch.logspace(0, -3, min(shape), dtype=torch.float64))


@SHAPES
@DTYPES
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_triples_are_those_of_the_svd(shape: tuple[int, int], dtype: torch.dtype, share: float) -> None:
    matrix = steep(shape).to(dtype)
    k = int(share * min(shape))
    triples = singular_triples(matrix, k)
    U, s, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    U, s, V = U[:, :k], s[:k], Vh[:k].T
    assert triples.left.shape == (shape[0], k)
    assert triples.right.shape == (shape[1], k)
    assert triples.left.dtype == triples.right.dtype == dtype
    torch.testing.assert_close(triples.singular_values, s, rtol=1e-9, atol=0)
    for ours, exact in ((triples.left.double(), U), (triples.right.double(), V)):
        torch.testing.assert_close(ours @ ours.T, exact @ exact.T, rtol=0, atol=TOLERANCE[dtype])
    rebuilt = triples.left.double() * s @ triples.right.double().T
    torch.testing.assert_close(rebuilt, U * s @ V.T, rtol=0, atol=TOLERANCE[dtype])


@SHAPES
@DTYPES
def test_the_partial_isometry_is_that_of_the_svd(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = steep(shape).to(dtype)
    before = matrix.clone()
    k = max(1, min(shape) // 3)
    top = dominant_subspace(matrix, k)
    U, s, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    torch.testing.assert_close(top.singular_values, s[:k], rtol=1e-9, atol=0)
    torch.testing.assert_close(top.partial_isometry.double(), U[:, :k] @ Vh[:k], rtol=0, atol=TOLERANCE[dtype])
    torch.testing.assert_close(polar_factor(matrix).double(), U @ Vh, rtol=0, atol=TOLERANCE[dtype])
    assert torch.equal(matrix, before)


@DTYPES
@pytest.mark.parametrize("shape", [(12, 30), (30, 12)], ids=str)
def test_directions_beyond_the_rank_are_left_out(shape: tuple[int, int], dtype: torch.dtype) -> None:
    values = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    exact = of_spectrum(*shape, values)
    matrix = exact.to(dtype)
    triples = singular_triples(matrix, 10)
    torch.testing.assert_close(triples.singular_values, values, rtol=1e-6, atol=0)
    assert triples.left.shape == (shape[0], 3)
    top = dominant_subspace(matrix, 10)
    assert top.singular_values.shape == (10,)
    assert torch.count_nonzero(top.singular_values) == 3
    U, _, Vh = torch.linalg.svd(exact, full_matrices=False)
    isometry = U[:, :3] @ Vh[:3]
    for ours in (top.partial_isometry, polar_factor(matrix)):
        torch.testing.assert_close(ours.double(), isometry, rtol=0, atol=TOLERANCE[dtype])


@DTYPES
def test_what_lies_below_the_floor_is_no_direction(dtype: torch.dtype) -> None:
    matrix = of_spectrum(6, 8, torch.tensor([1e-9, 1e-11], dtype=torch.float64)).to(dtype)
    assert len(singular_triples(matrix, 6).singular_values) == 2
    assert len(singular_triples(matrix, 6, floor=1e-10).singular_values) == 1
    assert len(singular_triples(matrix, 6, floor=1e-8).singular_values) == 0
    assert float(dominant_subspace(matrix, 6, floor=1e-8).partial_isometry.norm()) == 0


@DTYPES
def test_the_floor_of_a_difference_is_above_its_rounding(dtype: torch.dtype) -> None:
    matrix = steep((40, 30)).to(dtype)
    basis = singular_triples(matrix, 30).left
    residual = matrix - basis @ (basis.T @ matrix)
    floor = rounding_floor(float(matrix.norm()), dtype)
    assert 0 < float(residual.norm()) < floor < 1e-3
    assert len(singular_triples(residual, 30, floor=floor).singular_values) == 0


@pytest.mark.parametrize("shape", [(120, 120), (90, 240), (240, 90)], ids=str)
@pytest.mark.parametrize("error", [1e-5, 1e-3])
def test_what_an_error_of_the_matrix_does_to_its_isometry(shape: tuple[int, int], error: float) -> None:
    k = min(shape) // 3
    matrix = of_spectrum(*shape, 1.5 ** (-torch.arange(min(shape), dtype=torch.float64) / 8))
    generator = torch.Generator().manual_seed(0)
    exact = dominant_subspace(matrix, k)
    squares = []
    for _ in range(20):
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        noise *= error / noise.norm()
        moved = dominant_subspace(matrix + noise, k).partial_isometry - exact.partial_isometry
        squares.append(float(moved.square().sum()))
    estimated = float(isometry_error(exact.triples.spectrum, k, shape, error))
    assert estimated == pytest.approx((sum(squares) / 20) ** 0.5, rel=0.2)


@DTYPES
@pytest.mark.parametrize("shape", [(5, 0), (0, 5), (4, 4)], ids=str)
def test_nothing_has_no_directions(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = torch.zeros(shape, dtype=dtype)
    assert len(singular_triples(matrix, min(shape)).singular_values) == 0
    assert torch.equal(polar_factor(matrix), matrix)
