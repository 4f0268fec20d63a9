"""What is decided of a matrix before it is solved, by numbers that follow by hand, and what is told of its merge."""

import math
from dataclasses import replace

import pytest
import torch

from mergekit_ace.matrix import merge
from mergekit_ace.matrix.decision import Decision, decide, heterogeneity
from mergekit_ace.matrix.merge import MatrixMerge, MergeFacts, merge_by_covariance, takes_measured
from mergekit_ace.matrix.options import Bounds, Gate, SpectralRefinement
from mergekit_ace.matrix.presets import ACE, ACE_HEAD, ACE_PUBLISHED, ACTMAT, WUDI, with_epsilon
from mergekit_ace.matrix.refinement import spectral_refinement
from tests.linalg.matrices import of_rank
from tests.matrix.experts import adapter_updates, layer, related_updates, steep_updates

E = math.e


@pytest.mark.parametrize(
    ("energies", "published", "scale_free"),
    [
        ([5.0], 0.0, 0.0),
        ([3.0, 3.0], 0.0, 0.0),
        ([1.0, 1.0], 0.0, 0.0),
        # logarithms 1 and 3: variance 2, mean 2
        ([E, E**3], 0.5, 2.0),
        ([1 / E, E], math.inf, 2.0),
        # 0, 3 and 6: variance 9, mean 3
        ([1.0, E**3, E**6], 1.0, 9.0),
    ],
)
def test_the_spread_of_energies(energies: list[float], published: float, scale_free: float) -> None:
    assert heterogeneity(energies, "published") == pytest.approx(published)
    assert heterogeneity(energies, "scale_free") == pytest.approx(scale_free)


def test_the_gate_decides_what_is_normalized_and_refined() -> None:
    vectors = layer(steep_updates(20, 12, 3, spread=2.0))
    spread = heterogeneity(vectors.energies, "published")
    for threshold, passes in ((spread, False), (0.99 * spread, True)):
        options = replace(ACE_PUBLISHED, gate=Gate(statistic="published", threshold=threshold))
        decision = decide(vectors, options)
        assert decision.heterogeneity == spread
        assert decision.heterogeneous is passes
        assert decision.trace_normalized is passes
        assert decision.refined_directions == (3 if passes else 0)
        assert decision.refined_residual is passes


@pytest.mark.parametrize("unit", [2.0**-40, 2.0**40])
def test_the_gate_sees_energies_in_units_of_the_weights(unit: float) -> None:
    vectors = layer(steep_updates(20, 12, 3, spread=2.0))
    assert decide(vectors.in_units_of(unit), ACE_PUBLISHED).heterogeneity == pytest.approx(
        heterogeneity(vectors.energies, "published")
    )


def test_each_part_asks_for_what_it_needs() -> None:
    vectors = layer(steep_updates(20, 12, 3))
    published = decide(vectors, ACE_PUBLISHED)
    assert published.effective_experts is None
    assert published.low_rank is None
    assert (published.large, published.retained, published.held) == (0.0, 1.0, math.inf)
    assert published.longest == math.inf
    assert (published.least_shrinkage, published.refinement_scale) == (0.0, 1.0)
    wudi = decide(vectors, WUDI)
    assert (wudi.heterogeneous, wudi.trace_normalized, wudi.refined_directions) == (None, True, 0)
    assert wudi.refined_residual is False
    assert decide(vectors, ACTMAT).trace_normalized is False
    head = decide(vectors, ACE_HEAD)
    assert head.low_rank is None
    assert head.large > 0
    assert (head.retained, head.held, head.longest) == (1.0, math.inf, math.inf)
    ace = decide(vectors, ACE)
    assert ace.effective_experts is not None
    assert ace.refinement_scale == pytest.approx(1 - 1 / ace.effective_experts)
    assert ace.heterogeneity == heterogeneity(vectors.energies, "scale_free")
    assert ace.low_rank == 0.0
    assert ace.retained == ace.large == head.large
    energy = sum(vectors.energies) / 3
    assert ace.held == pytest.approx(math.sqrt(math.sqrt(ace.effective_experts) * energy))
    assert ace.longest == pytest.approx(2 * sum(math.sqrt(e) for e in vectors.energies))
    for length in ("none", "orthogonal", "end_to_end"):
        other = decide(vectors, replace(ACE, bounds=Bounds(length=length)))  # type: ignore[arg-type]
        assert (other.held, other.retained) == (math.inf, 1.0)
    orthogonal = decide(vectors, replace(ACE, bounds=Bounds(length="orthogonal")))
    assert orthogonal.longest == pytest.approx(math.sqrt(ace.effective_experts * energy))
    adapters = decide(layer(adapter_updates(64, 48, 3, rank=2)), ACE)
    assert adapters.low_rank == 1.0
    assert adapters.least_shrinkage == 0.95
    assert adapters.retained == 1.0
    assert adapters.longest == adapters.held


NOTHING = Decision(
    heterogeneity=0.1234,
    heterogeneous=None,
    trace_normalized=True,
    refined_directions=0,
    refined_residual=False,
    low_rank=None,
    effective_experts=None,
    longest=math.inf,
)
UPDATE = torch.zeros(2, 3)


def told(decision: Decision = NOTHING, **facts: object) -> str:
    return MatrixMerge(task_vector=UPDATE, decision=decision, **facts).describe()  # type: ignore[arg-type]


def test_what_is_told_of_a_merge() -> None:
    assert MatrixMerge(task_vector=UPDATE).describe() == ""
    assert told() == ""
    assert told(averaged=1.0, correlation=0.0123) == "second moments correlate by 0.012 only, not used"
    assert told(measured=2) == "2 second moments measured"
    assert told(replace(NOTHING, heterogeneous=True)) == "heterogeneous (0.123)"
    assert told(replace(NOTHING, heterogeneous=False)) == "homogeneous (0.123)"
    assert told(ridge=0.0456) == "ridge 0.046 of the mean eigenvalue"
    assert told(condition=12345.0) == "condition 1.2e+04"
    assert told(products="bfloat16") == "products in bfloat16"
    assert told(replace(NOTHING, effective_experts=2.345)) == "2.3 independent experts"
    assert told(replace(NOTHING, low_rank=1.0)) == "low rank"
    assert told(replace(NOTHING, low_rank=0.25)) == "low rank 25%"
    assert told(replace(NOTHING, low_rank=0.0)) == ""
    assert told(averaged=0.25) == "25% without second moments"
    assert told(scale_factor=0.756) == "scaled by 0.76"
    refinement = replace(spectral_refinement(torch.eye(4), 2), level=1.2345)
    assert told(refinement=refinement, eigendecomposition="float64") == "2 directions refined by 1.23 in float64"
    assert told(ridge=1.0, condition=2.0, scale_factor=0.5) == (
        "ridge 1 of the mean eigenvalue, condition 2.0e+00, scaled by 0.50"
    )


def test_facts_are_all_but_the_tensors() -> None:
    merged = merge_by_covariance(layer(related_updates(40, 20, 3)), ACE)
    facts = merged.facts()
    assert type(facts) is MergeFacts
    assert (facts.decision, facts.ridge, facts.correlation) == (merged.decision, merged.ridge, merged.correlation)
    assert facts.ridge_is_fixed is False
    fixed = merge_by_covariance(layer(related_updates(40, 20, 3)), with_epsilon(ACE, 0.5)).facts()
    assert fixed.ridge_is_fixed is True
    assert facts.eigendecomposition == "float64"
    assert facts.refinement_norm is not None
    assert merged.refinement is not None
    assert merged.refinement.norm == facts.refinement_norm
    # Singular vectors as large as the matrix are not kept.
    assert merged.refinement.triples is None


def test_what_was_decided_is_told_where_no_second_moment_was_used() -> None:
    vectors = layer(adapter_updates(64, 48, 3, rank=2))
    merged = merge_by_covariance(vectors, ACE)
    assert merged.decision == decide(vectors, ACE)
    assert merged.averaged == 1.0
    assert merged.correlation is not None
    assert 0 <= merged.correlation < ACE.correlation_threshold
    assert merged.describe() == f"second moments correlate by {merged.correlation:.2g} only, not used"
    assert (merged.moments, merged.ridge, merged.refinement, merged.scale_factor) == ((), None, None, 1.0)


def test_a_merge_in_other_units() -> None:
    merged = merge_by_covariance(layer(related_updates(40, 20, 3)), ACE)
    assert merged.refinement is not None
    assert merged.refinement_norm is not None
    before, update = merged.task_vector.clone(), merged.refinement.update.clone()
    norm, level = merged.refinement_norm, merged.refinement.level
    doubled = merged.times_(2.0)
    assert torch.equal(doubled.task_vector, 2 * before)
    assert doubled.refinement is not None
    assert torch.equal(doubled.refinement.update, 2 * update)
    assert (doubled.refinement_norm, doubled.refinement.level) == (2 * norm, 2 * level)
    plain = MatrixMerge(task_vector=torch.ones(2, 2)).times_(3.0)
    assert (plain.refinement, plain.refinement_norm) == (None, None)


@pytest.mark.parametrize("bounds", [Bounds(length="orthogonal"), Bounds(retention=True)], ids=["length", "retention"])
def test_bounds_scale_the_refinement_with_the_merge(bounds: Bounds) -> None:
    vectors = layer(steep_updates(60, 20, 4))
    options = replace(ACE, correlation_threshold=0.0)
    free = merge_by_covariance(vectors, replace(options, bounds=Bounds()))
    bounded = merge_by_covariance(vectors, replace(options, bounds=bounds))
    assert free.scale_factor == 1.0
    assert bounded.scale_factor < 0.9
    assert free.refinement is not None
    assert bounded.refinement is not None
    torch.testing.assert_close(bounded.task_vector, bounded.scale_factor * free.task_vector)
    torch.testing.assert_close(bounded.refinement.update, bounded.scale_factor * free.refinement.update)
    assert bounded.refinement_norm == pytest.approx(bounded.scale_factor * free.refinement.norm)
    assert bounded.refinement.level == pytest.approx(bounded.scale_factor * free.refinement.level)


def test_which_options_take_measured_moments() -> None:
    assert takes_measured(ACE)
    assert takes_measured(WUDI)
    assert not takes_measured(ACE_PUBLISHED)
    assert not takes_measured(replace(ACE, structural_prior=True))
    assert not takes_measured(replace(ACE, refinement=SpectralRefinement(fraction=0.1, of="residual")))


@pytest.mark.parametrize(
    ("correlation", "share"), [(None, 0.0), (0.0, 1.0), (0.05, 1.0), (0.06, 0.8), (0.1, 0.0), (0.5, 0.0)]
)
def test_the_share_without_moments(correlation: float | None, share: float) -> None:
    assert merge._averaged(correlation, 0.05) == pytest.approx(share)


def test_a_basis_of_the_columns_gives_the_same_refinement_in_fewer_dimensions() -> None:
    structure = of_rank(40, 30, 5)
    basis = torch.linalg.qr(structure[:, :8]).Q
    plain = spectral_refinement(structure, 7, scale=0.5)
    small = spectral_refinement(structure, 7, scale=0.5, column_basis=basis)
    torch.testing.assert_close(small.update, plain.update)
    assert (small.directions, small.level, small.norm) == (7, pytest.approx(plain.level), pytest.approx(plain.norm))
    assert small.triples is not None
    assert small.triples.left.shape == (8, 5)
    # 1 + 1/2 + .. + 1/5, over seven directions, and five of norm 1
    assert plain.level == pytest.approx(0.5 * (1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5) / 7)
    assert plain.norm == pytest.approx(plain.level * math.sqrt(5))
    assert plain.follows(0.1, (40, 30)) == math.inf


def test_bounds_ask_for_a_retention() -> None:
    assert not Bounds().asks_for_retention
    assert Bounds(retention=True).asks_for_retention
    assert Bounds(retention="by_size").asks_for_retention
