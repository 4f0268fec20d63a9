"""What errors do to singular vectors, by the documented sums written as loops; eigenvectors in float32."""

import math

import pytest
import torch

from mergekit_ace.linalg.random_draws import normal_numbers
from mergekit_ace.linalg.single_precision import _exchanged, _sensitivity, estimated_vectors
from mergekit_ace.linalg.subspace import dominant_subspace, isometry_error, polar_factor, singular_triples
from tests.linalg.matrices import of_spectrum

SPECTRUM = [5.0, 4.0, 2.5, 2.5, 1.0, 0.25]


@pytest.mark.parametrize("k", [1, 3, 5, 6])
@pytest.mark.parametrize("shape", [(6, 6), (6, 11), (11, 6)], ids=str)
@pytest.mark.parametrize("error", [1e-6, 0.3, 30.0])
def test_the_error_of_an_isometry(k: int, shape: tuple[int, int], error: float) -> None:
    variance = error**2 / (shape[0] * shape[1])
    total = 0.0
    for i in range(k):
        for j in range(k, 6):
            s, t = SPECTRUM[i], SPECTRUM[j]
            apart = (s**2 - t**2) ** 2
            total += min(2.0, 2 * variance * (s**2 + t**2) / apart) if apart else 2.0
        for j in range(k):
            total += min(2.0, 2 * variance / (SPECTRUM[i] + SPECTRUM[j]) ** 2)
        total += min(2.0, abs(shape[0] - shape[1]) * variance / SPECTRUM[i] ** 2)
    found = isometry_error(torch.tensor(SPECTRUM, dtype=torch.float64), k, shape, error)
    assert float(found) == pytest.approx(math.sqrt(total), rel=1e-12)


def test_a_tie_at_the_cut_is_an_exchange_even_without_an_error() -> None:
    spectrum = torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64)
    assert float(isometry_error(spectrum, 2, (3, 3), 0.0)) == pytest.approx(math.sqrt(2.0))
    assert float(_exchanged(spectrum, 2, torch.tensor(0.0, dtype=torch.float64))) == pytest.approx(2.0)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("squares", [1e-9, 0.4, 100.0])
def test_the_first_order_of_rounding(k: int, squares: float) -> None:
    eigenvalues = torch.tensor([value**2 for value in SPECTRUM], dtype=torch.float64)
    values = eigenvalues[:k].sqrt()
    own = sum(1 / (s * (s + t)) ** 2 for s in SPECTRUM[:k] for t in SPECTRUM[:k])
    assert float(_sensitivity(eigenvalues[:k], values)) == pytest.approx(own)
    exchanged = 0.0
    for s in SPECTRUM[:k]:
        for t in SPECTRUM[k:]:
            apart = (s**2 - t**2) ** 2
            exchanged += (min(1.0, squares / apart) if apart else 1.0) * (1 + t**2 / s**2)
    assert float(_exchanged(eigenvalues, k, torch.tensor(squares, dtype=torch.float64))) == pytest.approx(exchanged)
    # An eigenvalue that rounding put below zero is none.
    eigenvalues[-1] = -1e-9
    without = float(_exchanged(eigenvalues, k, torch.tensor(squares, dtype=torch.float64)))
    eigenvalues[-1] = 0.0
    assert float(_exchanged(eigenvalues, k, torch.tensor(squares, dtype=torch.float64))) == pytest.approx(without)


def test_vectors_in_float32() -> None:
    values = torch.linspace(3, 1, 40, dtype=torch.float64)
    matrix = of_spectrum(40, 60, values).float()
    found = estimated_vectors(matrix, 10)
    assert found.left.shape == (40, 10)
    torch.testing.assert_close(found.left.T @ found.left, torch.eye(10), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.singular_values, values[:10], rtol=1e-5, atol=0)
    torch.testing.assert_close(found.spectrum, values, rtol=1e-5, atol=0)
    assert found.on_host == tuple(found.singular_values.tolist())
    torch.testing.assert_close(found.gram, matrix @ matrix.T)
    assert 0 < found.error < 1e-2
    assert estimated_vectors(torch.zeros(4, 6), 2).error == math.inf
    rank_one = torch.zeros(4, 6)
    rank_one[0, 0] = 2.0
    assert estimated_vectors(rank_one, 2).error == math.inf
    assert estimated_vectors(rank_one, 1).error < 1e-6
    # All directions, of which one is none: rounding of the others is no estimate of it.
    without = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    without[2] = 0.0
    assert estimated_vectors(without, 3).error == math.inf
    assert 0 < estimated_vectors(without[:2], 2).error < 1e-5
    # All directions: nothing is exchanged across a cut.
    every = estimated_vectors(matrix, 40)
    assert 0 < every.error < found.error


@pytest.mark.parametrize("shape", [(9, 14), (14, 9)], ids=str)
def test_what_is_told_of_singular_vectors(shape: tuple[int, int]) -> None:
    values = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    matrix = of_spectrum(*shape, values)
    for dtype, gram in ((torch.float64, False), (torch.float32, True)):
        triples = singular_triples(matrix.to(dtype), 2)
        assert triples.gram is None
        assert triples.on_host == pytest.approx((4.0, 3.0))
        torch.testing.assert_close(triples.spectrum[:4], values, rtol=1e-6, atol=0)
        assert len(triples.spectrum) == 9
        top = dominant_subspace(matrix.to(dtype), 2)
        assert (top.estimated_error, top.products) == (None, None)
        assert (top.triples.gram is not None) is gram
        if top.triples.gram is not None:
            smaller = matrix.T @ matrix if shape[0] >= shape[1] else matrix @ matrix.T
            torch.testing.assert_close(top.triples.gram, smaller, rtol=1e-5, atol=1e-5)
        assert top.triples.left.dtype == top.triples.right.dtype == top.partial_isometry.dtype == dtype
        assert top.singular_values.device.type == "cpu"
    # Without an error that is allowed there is no float32, nor without directions.
    assert dominant_subspace(matrix.float(), 0, error=1.0).singular_values.shape == (0,)
    assert dominant_subspace(matrix.float(), 1, error=1.0).estimated_error is not None
    loose = dominant_subspace(matrix.float(), 2, error=1.0)
    assert loose.estimated_error is not None
    assert loose.products is None
    assert dominant_subspace(matrix.float(), 2, error=1.0, floor=3.5).estimated_error is None
    torch.testing.assert_close(polar_factor(matrix).square().sum().item(), 4.0)


def test_random_numbers_are_the_same_in_every_run_and_of_every_width() -> None:
    like = torch.empty(0, dtype=torch.float64)
    numbers = normal_numbers(50, 7, like=like)
    assert (numbers.shape, numbers.dtype) == ((50, 7), torch.float64)
    assert torch.equal(normal_numbers(50, 20, like=like)[:, :7], numbers)
    torch.manual_seed(5)
    assert torch.equal(normal_numbers(50, 7, like=like), numbers)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(numbers, torch.randn((50, 50), generator=generator, dtype=torch.float64)[:, :7])
    assert normal_numbers(3, 20, like=like).shape == (3, 20)
    wide = normal_numbers(200, 150, like=like)
    assert wide.shape == (200, 150)
    assert abs(float(wide.mean())) < 0.02
    assert float(wide.std()) == pytest.approx(1.0, rel=0.02)
    assert normal_numbers(4, 2, like=torch.empty(0)).dtype == torch.float32
