"""What float32 does to the dominant subspace, and that its estimate is to be trusted."""

import pytest
import torch
from torch import Tensor

from mergekit_ace.linalg import bfloat16
from mergekit_ace.linalg.single_precision import estimated_vectors
from mergekit_ace.linalg.subspace import _CAUTION, dominant_subspace
from tests.linalg.matrices import of_spectrum

SIZE = 192
PLACES = torch.arange(SIZE, dtype=torch.float64) / SIZE
SPECTRA = {
    "of a fine-tune": (1 + 77 * PLACES) ** -0.8,
    "flat": 1 - 0.5 * PLACES,
    "three decades": 10 ** (-3 * PLACES),
    "steep": (1 + SIZE * PLACES) ** -1.5,
    "steeper": (1 + SIZE * PLACES) ** -2,
    "a step below the cut": torch.where(PLACES < 0.35, 1.0, 0.1).double(),
}
K = int(0.3 * SIZE)


def mean_level(matrix: Tensor) -> Tensor:
    """`mean(s_1..s_k) U_k V_k^T` by the float64 SVD."""
    U, s, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return s[:K].mean() * U[:, :K] @ Vh[:K]


@pytest.mark.parametrize("shape", [(SIZE, SIZE), (SIZE, 3 * SIZE), (2 * SIZE, SIZE)], ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_no_error_is_above_what_was_allowed(shape: tuple[int, int], spectrum: str) -> None:
    matrix = of_spectrum(*shape, SPECTRA[spectrum]).float()
    exact = mean_level(matrix)
    in_float32 = 0
    for allowed in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1):
        allowed *= float(exact.norm())
        top = dominant_subspace(matrix, K, error=allowed)
        ours = top.singular_values.mean() * top.partial_isometry.double()
        if top.estimated_error is None:
            # float64, whose vectors are rounded to float32; a tie at the cut is a choice
            assert spectrum.startswith("a step") or float((ours - exact).norm()) < 2e-6 * float(exact.norm())
        else:
            in_float32 += 1
            assert float((ours - exact).norm()) <= allowed
    assert in_float32 == {"of a fine-tune": 3, "flat": 4, "three decades": 4}.get(spectrum, in_float32)


@pytest.mark.parametrize("spectrum", ["of a fine-tune", "flat", "three decades", "steep"])
def test_the_estimate_is_that_of_the_error(spectrum: str) -> None:
    matrix = of_spectrum(SIZE, SIZE, SPECTRA[spectrum]).float()
    found = estimated_vectors(matrix, K)
    values = found.singular_values
    isometry = (found.left.double() / values) @ (found.left.double().T @ matrix.double())
    error = float((values.mean() * isometry - mean_level(matrix)).norm())
    assert error / _CAUTION <= found.error <= 20 * error


def test_what_float32_cannot_tell_from_zero_is_taken_in_float64() -> None:
    matrix = of_spectrum(SIZE, SIZE, 10 ** (-12 * PLACES)).float()
    assert dominant_subspace(matrix, K, error=1e-4).estimated_error is None
    rank_one = of_spectrum(SIZE, SIZE, torch.ones(1, dtype=torch.float64)).float()
    top = dominant_subspace(rank_one, K, error=1e-2)
    assert top.estimated_error is None
    assert torch.count_nonzero(top.singular_values) == 1
    assert dominant_subspace(torch.zeros(8, 8), 2, error=1.0).estimated_error is None


def test_float64_is_never_lowered() -> None:
    matrix = of_spectrum(SIZE, SIZE, SPECTRA["flat"])
    assert dominant_subspace(matrix, K, error=1.0).estimated_error is None


@pytest.mark.parametrize("shape", [(SIZE, SIZE), (SIZE, 3 * SIZE), (2 * SIZE, SIZE)], ids=str)
def test_products_of_the_vectors_are_in_bfloat16_where_the_error_allows_it(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bfloat16, "is_faster", lambda *_: True)
    matrix = of_spectrum(*shape, SPECTRA["of a fine-tune"]).float()
    exact = mean_level(matrix)
    rough = 0
    for allowed in (1e-3, 2e-3, 5e-3, 1e-2):
        allowed *= float(exact.norm())
        top = dominant_subspace(matrix, K, error=allowed)
        assert top.estimated_error is not None
        error = float((top.singular_values.mean() * top.partial_isometry.double() - exact).norm())
        assert error <= allowed
        if error > 1e-3 * float(exact.norm()):
            rough += 1
            assert top.products == "bfloat16"
            assert error == pytest.approx(top.estimated_error, rel=0.1)
    assert rough >= 1
