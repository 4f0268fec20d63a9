"""Ridges: the published one, and the shrinkage that needs no constant."""

import math

import pytest
import torch

from mergekit_ace.matrix.merge import merge_by_covariance
from mergekit_ace.matrix.options import CovarianceOptions, SecondMoment, SpectralRefinement
from mergekit_ace.matrix.second_moment import fixed_ridge, relative_ridge, shrunk_ridge
from tests.matrix.experts import layer, steep_updates


def test_published_ridge() -> None:
    plain = fixed_ridge(1e-2, trace=4.0, normalize=False)
    assert (plain.scale, plain.ridge) == (1.0, 1e-2)
    normalized = fixed_ridge(1e-2, trace=4.0, normalize=True)
    assert (normalized.scale, normalized.ridge) == (0.25, 2.5e-3)


def test_relative_ridge_is_in_units_of_the_mean_eigenvalue() -> None:
    proxies = [fixed_ridge(0.5, trace=10.0, normalize=False), fixed_ridge(0.5, trace=30.0, normalize=False)]
    # Ridges sum to 1, traces to 40 over 20 dimensions: a mean eigenvalue of 2.
    assert relative_ridge(proxies, [1.0, 1.0], 20) == pytest.approx(0.5)
    assert relative_ridge([fixed_ridge(0.5, trace=0.0, normalize=False)], [1.0], 20) == math.inf


@pytest.mark.parametrize("factor", [1e-4, 1e4])
def test_shrinkage_does_not_depend_on_the_unit(factor: float) -> None:
    rows = torch.randn(30, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 9)

    def of(gram: torch.Tensor) -> tuple[float, float]:
        trace, squared = float(gram.trace()), float(gram.square().sum())
        shrunk = shrunk_ridge(trace=trace, squared_norm=squared, samples=30, dimensions=8, normalize=False)
        return shrunk.scale, shrunk.ridge / trace

    assert of(factor * rows.T @ rows) == pytest.approx(of(rows.T @ rows))


@pytest.mark.parametrize("factor", [0.01, 100.0])
@pytest.mark.parametrize("refined", [False, True])
def test_automatic_merge_scales_with_the_updates(factor: float, refined: bool) -> None:
    options = CovarianceOptions(
        second_moment=SecondMoment(), refinement=SpectralRefinement(fraction=0.3) if refined else None
    )
    updates = steep_updates(30, 50, 3, spread=2.0)
    merged = merge_by_covariance(layer(updates), options).task_vector
    scaled = merge_by_covariance(layer([factor * update for update in updates]), options).task_vector
    torch.testing.assert_close(scaled / factor, merged, rtol=0, atol=1e-9)
