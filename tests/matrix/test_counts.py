"""Scalars and counts by which routes, bounds and estimates are chosen, each against its own formula."""

import math
from dataclasses import replace
from typing import Literal

import pytest
import torch

from mergekit_ace.linalg import bfloat16
from mergekit_ace.linalg.blocks import LARGEST_BLOCK
from mergekit_ace.linalg.low_rank import orthonormal_factors
from mergekit_ace.matrix.bounds import scale_factor
from mergekit_ace.matrix.budget import FOLLOWING, PRODUCTS, SHARE_OF_ROUNDING, error_budget
from mergekit_ace.matrix.decision import decide
from mergekit_ace.matrix.merge import merge_by_covariance
from mergekit_ace.matrix.normal_equations import retention
from mergekit_ace.matrix.presets import ACE, ACE_PUBLISHED, with_epsilon
from mergekit_ace.matrix.refinement import spectral_refinement
from mergekit_ace.matrix.second_moment import (
    RegularizedMoment,
    fixed_ridge,
    moment_correlation,
    regularize,
    relative_ridge,
    shrunk_ridge,
)
from mergekit_ace.matrix.stacked_rows import _allowed_error
from mergekit_ace.matrix.workload import (
    averaging_bytes,
    by_matrix_weights,
    multiply_adds,
    unrefined_numbers,
    working_numbers,
)
from tests.linalg.matrices import of_rank
from tests.matrix.experts import layer, steep_updates
from tests.matrix.test_budget import task_vectors


def test_multiply_adds_of_stacked_rows() -> None:
    m, n, experts = 10, 100, 3
    q = 30
    products = q * q * n / 2 + 3 * m**3 + q**3 / 6 + m * q * q + 2 * m * q * n
    assert multiply_adds(m, n, experts) == products + m * m * n


def test_multiply_adds_of_matrix_weights() -> None:
    m, n, experts = 300, 40, 4
    assert by_matrix_weights(m, n, experts)
    products = 4 * n * n * m / 2 + n**3 / 6 + 3 * (n**3 + n * n * m)
    assert multiply_adds(m, n, experts) == products + n * n * m


@pytest.mark.parametrize(("m", "n"), [(60, 100), (100, 90)])
def test_multiply_adds_of_the_dense_system(m: int, n: int) -> None:
    """A wide matrix takes its other Gram matrix too, to add it up; a tall one has a product less."""
    experts = 9
    assert not by_matrix_weights(m, n, experts)
    small, large = min(m, n), max(m, n)
    each = small * small * large / 2 + m * n * small + (n * n * m / 2 if m < n else 0)
    solve = n**3 / 6 + (m * n * n if m < n else 0)
    assert multiply_adds(m, n, experts) == experts * each + solve + small * small * large


def test_multiply_adds_with_measured_moments() -> None:
    """Of fewer inputs than the matrix has, and of more."""
    m, n = 30, 50
    for inputs, rank in ((20, 20), (500, n)):
        each = n * n * (m + rank) / 2 + m * n * n
        assert multiply_adds(m, n, 2, measured=inputs) == 2 * each + n**3 / 6 + m * n * n + m * m * n


def test_matrix_weights_are_for_few_experts_of_tall_matrices() -> None:
    assert by_matrix_weights(100, 10, 11)
    assert not by_matrix_weights(100, 10, 12)
    assert not by_matrix_weights(9, 10, 2)
    # With factors in bfloat16 the memory of the second moments is what limits them.
    assert by_matrix_weights(100, 10, 37, halved=True)
    assert not by_matrix_weights(100, 10, 38, halved=True)


def test_moments_without_spread_are_shrunk_to_the_identity() -> None:
    moment = shrunk_ridge(trace=6.0, squared_norm=12.0, samples=50, dimensions=3, normalize=False)
    assert (moment.scale, moment.ridge) == (0.0, 2.0)


@pytest.mark.parametrize("epsilon", ["auto", 0.5])
def test_rows_that_are_all_equal_have_no_centered_moment(epsilon: float | Literal["auto"]) -> None:
    row = torch.arange(5, dtype=torch.float64)
    vectors = layer([row.repeat(4, 1), steep_updates(4, 5, 1)[0]], base_scale=0.0)
    options = with_epsilon(ACE_PUBLISHED, epsilon)
    decision = decide(vectors, replace(options, gate=None))
    moment = regularize(vectors, 0, options, decision, squared=0.0)
    assert moment == RegularizedMoment(scale=0.0, ridge=0.0, trace=0.0, squared_norm=0.0)
    assert moment.own_response == 0.0
    unnormalized = replace(decision, trace_normalized=False)
    if epsilon != "auto":
        fixed = regularize(vectors, 0, options, unnormalized, squared=0.0)
        assert fixed == RegularizedMoment(scale=1.0, ridge=0.5, trace=0.0, squared_norm=0.0)


def test_the_retention_is_the_response_over_the_experts_own() -> None:
    moments = [RegularizedMoment(scale=2.0, ridge=0.5, trace=4.0, squared_norm=3.0, response=r) for r in (None, 10.0)]
    # 0.5 (2 * 3 + 0.5 * 4) + 1.5 * 10
    assert retention(38.0, moments, [0.5, 1.5]) == pytest.approx(2.0)
    nothing = RegularizedMoment(scale=0.0, ridge=0.0, trace=0.0, squared_norm=0.0)
    assert retention(1.0, [nothing], [1.0]) == 0.0


def test_ridges_by_hand() -> None:
    """`G` of eigenvalues 1, 2 and 3: trace 6, squared norm 14, spread 2."""
    numerator, denominator = 14 / 3 + 36, (50 + 1 - 2 / 3) * 2
    rho = numerator / denominator
    plain = shrunk_ridge(trace=6.0, squared_norm=14.0, samples=50, dimensions=3, normalize=False)
    assert (plain.scale, plain.ridge) == pytest.approx((1 - rho, 2 * rho))
    assert (plain.trace, plain.squared_norm) == (6.0, 14.0)
    normalized = shrunk_ridge(trace=6.0, squared_norm=14.0, samples=50, dimensions=3, normalize=True)
    assert (normalized.scale, normalized.ridge) == pytest.approx(((1 - rho) / 6, rho / 3))
    held = shrunk_ridge(trace=6.0, squared_norm=14.0, samples=50, dimensions=3, normalize=False, least=0.9)
    assert (held.scale, held.ridge) == pytest.approx((0.1, 1.8))
    few = shrunk_ridge(trace=6.0, squared_norm=14.0, samples=2, dimensions=3, normalize=False)
    assert (few.scale, few.ridge) == (0.0, 2.0)
    assert plain.own_response == pytest.approx((1 - rho) * 14 + 2 * rho * 6)
    assert replace(plain, response=5.0).own_response == 5.0
    fixed = fixed_ridge(0.5, trace=4.0, normalize=True)
    assert (fixed.scale, fixed.ridge, fixed.trace) == (0.25, 0.125, 4.0)
    fixed = fixed_ridge(0.5, trace=4.0, normalize=False)
    assert (fixed.scale, fixed.ridge, fixed.trace) == (1.0, 0.5, 4.0)
    both = [fixed, replace(fixed, scale=2.0, ridge=1.0, trace=3.0)]
    # (0.5 * 0.5 + 1.5 * 1) * 3 over 0.5 * 4 + 1.5 * 6
    assert relative_ridge(both, [0.5, 1.5], 3) == pytest.approx(1.75 * 3 / 11)
    assert relative_ridge([replace(fixed, scale=0.0)], [1.0], 3) == math.inf


def test_the_correlation_of_moments_is_that_of_the_matrices() -> None:
    """About the identity, of all pairs, weighted; written out with the matrices themselves."""
    grams = [update.T @ update for update in (of_rank(9, 5, 5), of_rank(9, 5, 4, seed=3), of_rank(9, 5, 5, seed=6))]
    shares, scales = [0.5, 1.0, 1.5], [1.0, 0.3, 2.0]
    moments = [
        RegularizedMoment(scale=s, ridge=0.1, trace=float(g.trace()), squared_norm=float(g.square().sum()))
        for g, s in zip(grams, scales, strict=True)
    ]
    weights = [a * s * float(g.trace()) for a, s, g in zip(shares, scales, grams, strict=True)]
    centered = [g / g.trace() - torch.eye(5, dtype=torch.float64) / 5 for g in grams]
    pairs = [(s, t) for s in range(3) for t in range(3) if s != t]
    together = sum(weights[s] * weights[t] * float((centered[s] * centered[t]).sum()) for s, t in pairs)
    most = sum(weights[s] * weights[t] * float(centered[s].norm() * centered[t].norm()) for s, t in pairs)
    summed = sum(a * s * g for a, s, g in zip(shares, scales, grams, strict=True))
    found = moment_correlation(moments, shares, summed_squared_norm=float(summed.square().sum()), dimensions=5)
    assert found == pytest.approx(together / most, rel=1e-9)
    assert 0.1 < found < 0.9
    # One without rows has no part; multiples of the identity have nothing to correlate.
    nothing = RegularizedMoment(scale=0.0, ridge=0.0, trace=0.0, squared_norm=0.0)
    again = moment_correlation(
        [*moments, nothing], [*shares, 1.0], summed_squared_norm=float(summed.square().sum()), dimensions=5
    )
    assert again == pytest.approx(found)
    flat = [RegularizedMoment(scale=1.0, ridge=0.0, trace=5.0, squared_norm=5.0)] * 2
    assert moment_correlation(flat, [1.0, 1.0], summed_squared_norm=20.0, dimensions=5) == 1.0


def test_ridges_beyond_float32_are_divided_by_the_largest() -> None:
    """The solution does not depend on a common factor; a residual does, and is refused."""
    updates = [1e-17 * update for update in steep_updates(30, 20, 3)]
    vectors = layer(updates, dtype=torch.float32, base_scale=0.0)
    solve = replace(ACE_PUBLISHED, second_moment=replace(ACE_PUBLISHED.second_moment, epsilon=1e6), gate=None)
    plain = replace(solve, refinement=None)
    moments = [regularize(vectors, t, plain, decide(vectors, plain), squared=None) for t in range(3)]
    assert max(moment.ridge for moment in moments) == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"epsilon must leave ridges that torch\.float32 can hold"):
        merge_by_covariance(vectors, solve)
    ordinary = layer(steep_updates(30, 20, 3), dtype=torch.float32)
    epsilon = regularize(ordinary, 0, plain, decide(ordinary, plain), squared=None).ridge
    assert epsilon == pytest.approx(1e6 / ordinary.statistics[0].centered_energy)


def test_what_is_zero_is_not_scaled() -> None:
    assert scale_factor(0.0, retention=None, longest=1.0) == 1.0
    assert scale_factor(0.0, retention=2.0, longest=0.0) == 0.5
    assert scale_factor(4.0, retention=1.25, longest=1.0) == 0.25
    assert scale_factor(4.0, retention=1.44, longest=9.0, retained=0.5) == pytest.approx(1 / 1.2)
    assert scale_factor(9.0, retention=None, longest=9.0, held=4.0, large=0.5) == pytest.approx(2 / 3)


def test_the_budget_is_an_eighth_of_rounding_or_of_the_update() -> None:
    vectors = task_vectors((96, 64), 0.01, "of a fine-tune", torch.bfloat16)
    rounding, length = vectors.output_rounding, math.sqrt(vectors.energy_of_mean)
    exact = SHARE_OF_ROUNDING / math.sqrt(1 / rounding**2 + 1 / length**2)
    assert error_budget(vectors, "auto") == pytest.approx(exact)
    assert error_budget(vectors, "full") == 0
    assert error_budget(task_vectors((96, 64), 0.01, "steep", torch.float32), "auto") == 0
    vectors.energy_of_mean = 0.0
    assert error_budget(vectors, "auto") == 0


def test_full_precision_allows_no_error_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat16, "is_faster", lambda *_: True)
    vectors = task_vectors((64, 256), 0.01, "of a fine-tune", torch.bfloat16)
    assert _allowed_error(vectors, 192, ACE) == pytest.approx(PRODUCTS * error_budget(vectors, "auto") / FOLLOWING)
    assert _allowed_error(vectors, 192, replace(ACE, precision="full")) == 0
    asked = []
    monkeypatch.setattr(bfloat16, "is_faster", lambda device, *sides: asked.append((device.type, sorted(sides))))
    assert _allowed_error(vectors, 192, ACE) == 0
    assert asked == [("cpu", [64, 192, 256])]


def test_a_refinement_is_scaled_as_a_whole() -> None:
    refinement = spectral_refinement(of_rank(20, 12, 12), 4)
    level, norm, update = refinement.level, refinement.norm, refinement.update.clone()
    half = refinement.times_(0.5)
    assert (half.level, half.norm) == (level / 2, norm / 2)
    assert torch.equal(half.update, update / 2)
    assert half.norm == pytest.approx(float(half.update.norm()))


def test_a_residual_that_is_no_rounding_is_found() -> None:
    """Far too small to be seen in the energies, and larger than the tolerance."""
    noise = torch.randn(120, 150, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    low_rank = of_rank(120, 150, 5)
    disturbed = low_rank + 1e-6 * float(low_rank.norm()) / float(noise.norm()) * noise
    tolerance = 1e-8 * float(low_rank.norm())
    assert orthonormal_factors(low_rank.clone(), most=20, tolerance=tolerance) is not None
    assert orthonormal_factors(disturbed, most=20, tolerance=tolerance) is None


@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_a_residual_outside_of_the_sketch_counts(size: float) -> None:
    """Noise in all directions alike: each has less than its part of the tolerance, all of them together have more."""
    noise = torch.linalg.qr(torch.randn(150, 120, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q.T
    low_rank = of_rank(120, 150, 5)
    low_rank *= size / low_rank.norm()
    for share, found in ((0.5, True), (1.6, False)):
        tolerance = 1e-4 * size
        matrix = low_rank + share * tolerance / float(noise.norm()) * noise
        assert (orthonormal_factors(matrix, most=20, tolerance=tolerance) is not None) is found


def test_averages_hold_their_result_and_three_copies_of_a_block() -> None:
    """Bytes, beyond the inputs: the result in the stored dtype, the mean in the working one; of a block 4 + 8 + 8."""
    assert averaging_bytes(1000, torch.float32) == 4 * 1000 + 20 * 1000
    assert averaging_bytes(1000, torch.float64) == 8 * 1000 + 24 * 1000
    assert averaging_bytes(1000, torch.bfloat16) == 6 * 1000 + 20 * 1000
    assert averaging_bytes(10 * LARGEST_BLOCK, torch.bfloat16) == 60 * LARGEST_BLOCK + 20 * LARGEST_BLOCK


def test_numbers_held_by_a_merge() -> None:
    # 3 n^2 + 6 m n of the solve; 7 m n + 10 min(m, n)^2 of the refinement
    assert working_numbers(10, 30, 8) == 3 * 900 + 6 * 300
    assert working_numbers(30, 10, 8) == 7 * 300 + 10 * 100
    # few rows, q = 60: 2 q^2 + q n + 2 m q + 3 m n; with q = 20 the refinement
    assert working_numbers(10, 1000, 6) == 2 * 3600 + 60_000 + 2 * 600 + 3 * 10_000
    assert working_numbers(10, 1000, 2) == 7 * 10_000 + 10 * 100
    assert working_numbers(10, 30, 8, measured=True) == 4 * 900 + 4 * 300
    assert working_numbers(30, 10, 8, measured=True) == 7 * 300 + 10 * 100


def test_numbers_held_by_the_merge_of_a_head() -> None:
    assert unrefined_numbers(100, 20, 3) == 100 * 20 + 7 * 400 + 3 * 100 * 20
    # Pieces of 2^26 elements, of a longer one.
    assert unrefined_numbers(2**20, 1024, 3) == 2**30 + 7 * 2**20 + 3 * 2**26


@pytest.mark.parametrize(("threshold", "word"), [(0.0, "heterogeneous"), (1e9, "homogeneous")])
def test_a_gate_is_described(threshold: float, word: str) -> None:
    assert ACE_PUBLISHED.gate is not None
    options = replace(ACE_PUBLISHED, gate=replace(ACE_PUBLISHED.gate, threshold=threshold))
    described = merge_by_covariance(layer(steep_updates(30, 20, 3, spread=2.0)), options).describe()
    assert word in described
    assert ("heterogeneous" in described) == (word == "heterogeneous")


def test_a_fixed_ridge_is_taken_as_it_is() -> None:
    vectors = layer(steep_updates(30, 20, 2))
    options = with_epsilon(ACE, 0.25)
    untraced = replace(options, second_moment=replace(options.second_moment, trace_normalized=False))
    moment = regularize(vectors, 0, untraced, decide(vectors, untraced), squared=1.0)
    assert (moment.scale, moment.ridge) == (1.0, 0.25)
    # In units of the second moments, which are those of the task vectors squared.
    scaled = regularize(vectors.in_units_of(8.0), 0, untraced, decide(vectors, untraced), squared=1.0)
    assert (scaled.scale, scaled.ridge) == (1.0, 0.25 / 64)
