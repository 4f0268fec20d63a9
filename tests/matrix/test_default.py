"""What the default of `ace` promises whatever the experts are."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from mergekit_ace.linalg.factors import Factors
from mergekit_ace.matrix.balanced import averaged_share, merge_balanced, merge_without_moments
from mergekit_ace.matrix.bounds import effective_experts, large_share
from mergekit_ace.matrix.coordinates import Coordinates
from mergekit_ace.matrix.core_task_vectors import CoreExpert, CoreTaskVectors
from mergekit_ace.matrix.decision import low_rank_share
from mergekit_ace.matrix.expert import Expert
from mergekit_ace.matrix.merge import MatrixMerge, merge_by_covariance
from mergekit_ace.matrix.options import Bounds, CovarianceOptions, SecondMoment
from mergekit_ace.matrix.presets import ACE, ACE_0_1, ACE_HEAD, ACE_PUBLISHED
from mergekit_ace.matrix.stored_task_vectors import StoredTaskVectors
from mergekit_ace.matrix.task_vectors import TaskVectors
from tests.matrix.experts import adapter_updates, layer, related_updates, steep_updates
from tests.reference.ace_default import balanced, effective, share_of_large, without_moments

ORTHOGONAL = Bounds(retention=True, length="orthogonal")
SHAPES = [(30, 50), (50, 30), (40, 40), (20, 200), (5, 1)]


def weighted(updates: list[torch.Tensor], weights: list[float]) -> TaskVectors:
    base = torch.zeros_like(updates[0])
    return StoredTaskVectors(
        base,
        [Expert(name=str(t), tensor=u, weight=w) for t, (u, w) in enumerate(zip(updates, weights, strict=True))],
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("count", [2, 5])
def test_identical_experts_give_that_expert(shape: tuple[int, int], count: int) -> None:
    update = steep_updates(*shape, 1)[0]
    merged = merge_by_covariance(layer([update] * count), ACE)
    torch.testing.assert_close(merged.task_vector, update, rtol=0, atol=1e-9 * float(update.abs().max()))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_expert_and_its_copy_are_one_of_twice_the_weight(shape: tuple[int, int]) -> None:
    first, second = related_updates(*shape, 2, spread=1.5)
    copied = merge_by_covariance(weighted([first, first, second], [1.0, 1.0, 1.0]), ACE).task_vector
    once = merge_by_covariance(weighted([first, second], [2.0, 1.0]), ACE).task_vector
    torch.testing.assert_close(copied, once, rtol=0, atol=1e-9 * float(once.abs().max()))


@pytest.mark.parametrize("factor", [0.01, 100.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_unit_of_the_weights_does_not_matter(shape: tuple[int, int], factor: float) -> None:
    updates = related_updates(*shape, 3, spread=3.0)
    scaled_updates = [factor * update for update in updates]
    for options in (ACE, ACE_HEAD):
        merged = merge_by_covariance(layer(updates), options).task_vector
        scaled = merge_by_covariance(layer(scaled_updates, base_scale=0.1 * factor), options).task_vector / factor
        torch.testing.assert_close(scaled, merged, rtol=0, atol=1e-9 * float(merged.abs().max()))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_size_of_small_updates_does_not_matter(shape: tuple[int, int]) -> None:
    """For the base; that of large ones does: it is what tells that they do not add up."""
    updates = related_updates(*shape, 3, spread=3.0)
    smaller = [update / 10 for update in updates]
    for options in (ACE, ACE_HEAD):
        merged = merge_by_covariance(layer(updates, base_scale=1e5), options).task_vector
        scaled = merge_by_covariance(layer(smaller, base_scale=1e5), options).task_vector * 10
        torch.testing.assert_close(scaled, merged, rtol=0, atol=1e-5 * float(merged.abs().max()))


SIZES_OF_THE_BASE = (1e4, 1.0, 1e-6)


def of_base(scale: float, options: CovarianceOptions) -> MatrixMerge:
    return merge_by_covariance(layer(related_updates(60, 40, 4), base_scale=scale), options)


def test_large_updates_are_held_half_the_way_to_the_sum_of_orthogonal_ones() -> None:
    small, middle, large = (of_base(scale, ACE) for scale in SIZES_OF_THE_BASE)
    updates = related_updates(60, 40, 4)
    assert large.decision is not None
    assert large.decision.effective_experts is not None
    one = math.sqrt(sum(float(update.square().sum()) for update in updates) / 4)
    held = large.decision.effective_experts**0.25 * one
    longest = float(small.task_vector.norm())
    assert longest > 1.1 * held
    assert float(large.task_vector.norm()) == pytest.approx(held, rel=1e-6)
    share = share_of_large(updates, [1.0] * 4, float(layer(updates, base_scale=1.0).base.norm()))
    assert 0.05 < share < 0.95
    assert middle.decision is not None
    assert middle.decision.large == pytest.approx(share)
    between = longest ** (1 - share) * held**share
    assert float(middle.task_vector.norm()) == pytest.approx(between, rel=1e-4)


def test_a_length_bound_changes_the_length_of_a_published_merge_alone() -> None:
    published = replace(ACE_PUBLISHED, gate=None)
    plain = of_base(1.0, published)
    bounded = of_base(1.0, replace(published, bounds=Bounds(length="orthogonal")))
    assert bounded.decision is not None
    assert bounded.decision.effective_experts is not None
    expected = bounded.scale_factor * plain.task_vector
    torch.testing.assert_close(bounded.task_vector, expected, rtol=0, atol=1e-9 * float(expected.abs().max()))


def test_large_updates_of_an_output_head_are_averaged() -> None:
    small, middle, large = (of_base(scale, ACE_HEAD) for scale in SIZES_OF_THE_BASE)
    updates = related_updates(60, 40, 4)
    mean = sum(updates[1:], updates[0]) / 4
    torch.testing.assert_close(large.task_vector, mean, rtol=0, atol=1e-6 * float(mean.abs().max()))
    assert middle.decision is not None
    share = middle.decision.large
    blended = (1 - share) * small.task_vector + share * mean
    torch.testing.assert_close(middle.task_vector, blended, rtol=0, atol=1e-4 * float(mean.abs().max()))


FULL_RANK = [related_updates(20, 90, 3), related_updates(30, 300, 4)]


@pytest.mark.parametrize("updates", FULL_RANK)
def test_the_mean_response_is_at_most_the_experts_own(updates: list[torch.Tensor]) -> None:
    task_vectors = layer(updates)
    merged = merge_by_covariance(task_vectors, replace(ACE, bounds=Bounds(retention=True)))
    assert merged.decision is not None
    assert merged.decision.low_rank == 0
    assert merged.retention is not None
    assert merged.retention > 1
    assert merged.scale_factor <= 1 / merged.retention
    own = kept = 0.0
    for update, proxy in zip(updates, merged.moments, strict=True):
        moment = proxy.scale * update.T @ update + proxy.ridge * torch.eye(update.shape[1], dtype=torch.float64)
        own += float(((update @ moment) * update).sum())
        kept += float(((merged.task_vector @ moment) * update).sum())
    assert kept / own == pytest.approx(merged.retention * merged.scale_factor, rel=1e-6)
    assert kept / own <= 1 + 1e-9


@pytest.mark.parametrize("updates", FULL_RANK)
def test_the_mean_response_is_bounded_as_far_as_updates_are_large(updates: list[torch.Tensor]) -> None:
    for scale, share in ((1e6, 0.0), (1e-6, 1.0)):
        by_size = merge_by_covariance(layer(updates, base_scale=scale), ACE)
        assert by_size.decision is not None
        assert by_size.retention is not None
        assert by_size.decision.retained == pytest.approx(share, abs=1e-6)
        told = replace(ACE, bounds=Bounds(retention=share == 1, length="end_to_end"))
        merged = merge_by_covariance(layer(updates, base_scale=scale), told)
        nearer = min(1.0, by_size.decision.held / float(merged.task_vector.norm())) if share == 1 else 1.0
        assert by_size.scale_factor == pytest.approx(merged.scale_factor * nearer, rel=1e-4)
    adapters = merge_by_covariance(
        layer(adapter_updates(64, 48, 3, rank=2), base_scale=1e6), replace(ACE, correlation_threshold=0.0)
    )
    assert adapters.decision is not None
    assert adapters.decision.retained == pytest.approx(1.0)


@pytest.mark.parametrize("updates", FULL_RANK)
def test_a_length_bound_keeps_to_the_reach_of_the_independent_updates(updates: list[torch.Tensor]) -> None:
    task_vectors = layer(updates)
    merged = merge_by_covariance(task_vectors, replace(ACE, bounds=ORTHOGONAL))
    assert merged.decision is not None
    assert merged.decision.effective_experts is not None
    longest = math.sqrt(merged.decision.effective_experts * sum(task_vectors.energies) / len(task_vectors))
    assert torch.linalg.norm(merged.task_vector) <= longest * (1 + 1e-9)
    assert merged.scale_factor < 1


def test_updates_of_low_rank_are_held_nearer_to_the_base() -> None:
    updates = [left @ right for left, right in zip(steep_updates(80, 6, 3), related_updates(6, 96, 3), strict=True)]
    task_vectors = layer(updates)
    energy = sum(task_vectors.energies) / len(task_vectors)
    told = merge_by_covariance(task_vectors, replace(ACE, correlation_threshold=0.0, bounds=ORTHOGONAL))
    merged = merge_by_covariance(task_vectors, replace(ACE, correlation_threshold=0.0))
    assert merged.decision is not None
    assert merged.decision.low_rank == 1
    assert merged.decision.effective_experts is not None
    longest = math.sqrt(merged.decision.effective_experts**0.5 * energy)
    assert torch.linalg.norm(merged.task_vector) <= longest * (1 + 1e-9)
    # what a warning recommends must not lengthen the merge
    torch.testing.assert_close(told.task_vector, merged.task_vector, rtol=0, atol=0)
    for proxy in merged.moments:
        identity = proxy.ridge * 96
        assert identity / (identity + proxy.scale * proxy.trace) >= 0.95 - 1e-9


@pytest.mark.parametrize("rank", [2, 5])
def test_rank_is_found_under_the_rounding_of_bfloat16(rank: int) -> None:
    base = torch.randn(128, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    adapters = adapter_updates(128, 96, 3, rank=rank)
    experts = [
        Expert(name=str(t), tensor=(base + (0.02 * base.float().norm() / update.norm() * update).float()).bfloat16())
        for t, update in enumerate(adapters)
    ]
    assert low_rank_share(StoredTaskVectors(base, experts)) == 1
    # twelve of 96 directions are counted as few
    assert low_rank_share(layer(adapter_updates(128, 96, 3, rank=60))) == 0


def test_independent_updates_are_counted() -> None:
    eye = torch.eye(6, dtype=torch.float64)
    orthogonal = [torch.outer(eye[t], eye[t]) for t in range(4)]
    zeros = torch.zeros(6, 6, dtype=torch.float64)
    experts = [Expert(name=str(t), tensor=update) for t, update in enumerate(orthogonal)]
    assert effective_experts(StoredTaskVectors(zeros, experts)) == pytest.approx(4.0)
    opposite = [Expert(name="up", tensor=orthogonal[0]), Expert(name="down", tensor=-orthogonal[0])]
    assert effective_experts(StoredTaskVectors(zeros, opposite)) == pytest.approx(4.0)


def test_opposite_experts_cancel() -> None:
    update = steep_updates(30, 20, 1)[0]
    merged = merge_by_covariance(layer([update, -update], base_scale=0.0), ACE).task_vector
    assert torch.linalg.norm(merged) < 1e-9 * torch.linalg.norm(update)


@pytest.mark.parametrize("options", [ACE, ACE_PUBLISHED, replace(ACE_PUBLISHED, gate=None)])
def test_updates_without_a_centered_second_moment_are_not_lost(options: CovarianceOptions) -> None:
    rows = torch.randn(2, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    task_vectors = layer([row.expand(20, 30) for row in rows], base_scale=0.0)
    merged = merge_by_covariance(task_vectors, options).task_vector
    assert bool(torch.isfinite(merged).all())
    assert torch.linalg.norm(merged) > 0.5 * torch.linalg.norm(task_vectors.sum() / 2)


ADAPTERS = [adapter_updates(280, 300, 4, rank=8), adapter_updates(60, 80, 3, rank=4)]


# Of the base's norm: from adapters of language models to what destroys a network.
SIZES = [0.001, 0.01, 0.1, 0.3, 3.0]


def sized(updates: list[torch.Tensor], size: float) -> TaskVectors:
    """Around a base of which the updates are that large in the mean."""
    energy = sum(float(update.square().sum()) for update in updates) / len(updates)
    return layer(updates, base_scale=(energy / updates[0].numel()) ** 0.5 / size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("updates", ADAPTERS)
def test_row_spaces_by_chance_are_merged_without_them(updates: list[torch.Tensor], size: float) -> None:
    updates = [3.0**t * update for t, update in enumerate(updates)]
    task_vectors = sized(updates, size)
    merged = merge_by_covariance(task_vectors, ACE)
    assert merged.averaged == 1
    assert merged.correlation is not None
    assert merged.correlation < 0.05
    expected = without_moments(updates, [1.0] * len(updates), float(task_vectors.base.norm()))
    torch.testing.assert_close(merged.task_vector, expected, rtol=0, atol=1e-9)


def test_small_updates_are_added_up_and_large_ones_averaged_without_a_cliff() -> None:
    updates = adapter_updates(60, 80, 3, rank=4)
    mean = sum(updates) / 3
    added = balanced(updates, [1.0] * 3)
    # Steps of a tenth, from a thousandth of the base to half of it and beyond.
    sizes = [0.001 * 1.1**step for step in range(100)]
    parts = []
    for size in sizes:
        merged = merge_without_moments(sized(updates, size))
        share = float(((merged - added) * (mean - added)).sum() / (mean - added).square().sum())
        torch.testing.assert_close(merged, added + share * (mean - added), rtol=0, atol=1e-9)
        parts.append(share)
    assert parts[0] < 1e-3
    assert parts[-1] > 0.99
    steps = [after - before for before, after in pairwise(parts)]
    assert min(steps) > 0
    # d w / d log s is a half where it is steepest, where the noise is a tenth of the base.
    assert max(steps) < 0.05
    of_three = 0.1 / math.sqrt(effective([*updates], [1.0] * 3) - 1)
    assert averaged_share(sized(updates, of_three)) == pytest.approx(0.5, rel=0.05)


def test_updates_are_large_from_an_eighth_of_the_base_over_all_blocks() -> None:
    updates = related_updates(60, 80, 3)

    def of_depth(size: float, depth: int | None) -> float:
        task_vectors = sized(updates, size)
        task_vectors.depth = depth
        return large_share(task_vectors)

    shares = [of_depth(0.001 * 1.1**step, 24) for step in range(100)]
    # From the base's entries, which are drawn, so that its norm is known to some percent.
    assert of_depth(0.125, 1) == pytest.approx(0.5, rel=0.1)
    assert of_depth(0.025, 25) == pytest.approx(0.5, rel=0.1)
    assert of_depth(0.00625, 25) == pytest.approx(1 / 257, rel=0.2)
    assert of_depth(0.1, 25) == pytest.approx(256 / 257, rel=0.01)
    assert of_depth(0.02, None) == of_depth(0.02, 32)
    # d w / d log s is one where it is steepest.
    assert all(0 < after - before < 0.1 for before, after in pairwise(shares))
    assert 0 <= large_share(sized(updates, 1e-12)) < 1e-30
    assert large_share(layer(updates, base_scale=0.0)) == 1.0


def test_updates_count_as_small_where_the_base_is_not_known_and_as_large_where_it_is_zero() -> None:
    updates = adapter_updates(60, 80, 3, rank=4)
    left, right = torch.ones(60, dtype=torch.float64), torch.ones(80, dtype=torch.float64)
    unknown = CoreTaskVectors(
        [CoreExpert(name=str(t), core=Factors(left=u, right=right.diag())) for t, u in enumerate(updates)],
        coordinates=Coordinates(shape=(60, 80), ones_left=left, ones_right=right),
    )
    torch.testing.assert_close(merge_without_moments(unknown), balanced(updates, [1.0] * 3), rtol=0, atol=1e-9)
    torch.testing.assert_close(merge_without_moments(weighted(updates, [1.0] * 3)), sum(updates) / 3)


@pytest.mark.parametrize("factor", [0.01, 100.0])
def test_base_and_updates_in_another_unit_give_the_same(factor: float) -> None:
    updates = [3.0**t * update for t, update in enumerate(adapter_updates(60, 80, 3, rank=4))]
    task_vectors = sized(updates, 0.1)
    merged = merge_by_covariance(task_vectors, ACE).task_vector
    experts = [replace(expert, tensor=factor * expert.tensor) for expert in reversed(task_vectors.experts)]
    other = merge_by_covariance(StoredTaskVectors(factor * task_vectors.base, experts), ACE).task_vector
    torch.testing.assert_close(other / factor, merged, rtol=0, atol=1e-9)
    inner = merge_by_covariance(task_vectors.in_units_of(2.0**20), ACE).task_vector
    torch.testing.assert_close(inner * 2.0**20, merged, rtol=0, atol=1e-9)


@pytest.mark.parametrize("updates", ADAPTERS)
def test_row_spaces_by_chance_were_averaged_by_0_1(updates: list[torch.Tensor]) -> None:
    merged = merge_by_covariance(layer(updates), ACE_0_1)
    assert merged.averaged == 1
    torch.testing.assert_close(merged.task_vector, sum(updates) / len(updates), rtol=0, atol=1e-9)


def test_a_balanced_merge_favours_none() -> None:
    eye = torch.eye(6, dtype=torch.float64)
    directions = [torch.outer(eye[t], eye[t]) for t in range(4)]
    torch.testing.assert_close(merge_balanced(weighted(directions, [1.0] * 4)), sum(directions))
    uneven = merge_balanced(weighted([directions[0], 4 * directions[1]], [1.0, 1.0]))
    # weights of 2 to 1: four thirds of the short update, two thirds of four for the long one
    torch.testing.assert_close(uneven, 4 / 3 * directions[0] + 8 / 3 * directions[1])
    twice = merge_balanced(weighted([directions[0], directions[1]], [2.0, 1.0]))
    assert float(twice[0, 0] / twice[1, 1]) == pytest.approx(2.0)


def test_the_more_independent_updates_are_the_more_even_they_become() -> None:
    """Orthogonal ones of one length: singular values to the power of `1 / T`, of the same norm."""
    one = torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64))
    for count in (1, 2, 3):
        updates = []
        for t in range(count):
            update = torch.zeros(6, 6, dtype=torch.float64)
            update[2 * t : 2 * t + 2, 2 * t : 2 * t + 2] = one
            updates.append(update)
        merged = merge_balanced(weighted(updates, [1.0] * count))
        values = torch.diagonal(merged)[: 2 * count].reshape(count, 2)
        assert values.square().sum(dim=1).tolist() == pytest.approx([17.0] * count)
        assert (values[:, 0] / values[:, 1]).tolist() == pytest.approx([4.0 ** (1 / count)] * count)


def test_a_balanced_merge_does_not_lift_what_is_rounding() -> None:
    """Adapters that were merged into bfloat16 weights have all directions, most of them by the rounding."""
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(96, 64, generator=generator).bfloat16()
    updates = adapter_updates(96, 64, 2, rank=3)
    experts = [Expert(name=str(t), tensor=(base + update.float()).bfloat16()) for t, update in enumerate(updates)]
    merged = merge_balanced(StoredTaskVectors(base, experts))
    values = torch.linalg.svdvals(merged.double())
    assert int((values > 1e-4 * values[0]).sum()) == 6
    exact = balanced(updates, [1.0, 1.0])
    assert float((merged.double() - exact).norm()) < 0.1 * float(exact.norm())


def test_a_balanced_merge_of_one_update_said_twice_is_that_update() -> None:
    update = adapter_updates(30, 20, 1, rank=4)[0]
    torch.testing.assert_close(merge_balanced(weighted([update, update], [1.0, 3.0])), update, rtol=0, atol=1e-12)


def test_a_balanced_merge_of_opposite_updates_cancels() -> None:
    update = adapter_updates(30, 20, 1, rank=4)[0]
    assert float(merge_balanced(weighted([update, -update], [1.0, 1.0])).norm()) < 1e-9 * float(update.norm())


def test_a_balanced_merge_follows_the_unit_and_not_the_order() -> None:
    updates = adapter_updates(40, 30, 3, rank=2)
    updates[1] *= 5
    merged = merge_balanced(weighted(updates, [1.0, 2.0, 0.5]))
    other = merge_balanced(weighted([100 * update for update in reversed(updates)], [0.5, 2.0, 1.0]))
    torch.testing.assert_close(other / 100, merged, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(60, 40), (20, 200)], ids=str)
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [3.0, 1.0, 0.5]], ids=str)
def test_correlation_is_that_of_all_pairs(shape: tuple[int, int], weights: list[float]) -> None:
    updates = related_updates(*shape, 3, spread=2.0)
    task_vectors = weighted(updates, weights)
    # A ridge of zero extent, so that the weights of the pairs are the experts' own.
    options = replace(ACE, second_moment=SecondMoment(epsilon=1e-12), refinement=None, bounds=Bounds())
    n = shape[1]
    moments = [update.T @ update / update.square().sum() - torch.eye(n, dtype=torch.float64) / n for update in updates]
    pairs = [(s, t) for s in range(3) for t in range(3) if s != t]
    together = sum(weights[s] * weights[t] * (moments[s] * moments[t]).sum() for s, t in pairs)
    most = sum(weights[s] * weights[t] * moments[s].norm() * moments[t].norm() for s, t in pairs)
    merged = merge_by_covariance(task_vectors, options)
    assert merged.correlation == pytest.approx(float(together / most), rel=1e-9)


@pytest.mark.parametrize("rank", [8, 1100])
def test_a_sample_shows_large_fine_tunes_to_be_no_adapters(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1100, 2300, generator=generator)
    experts = [
        base + 0.01 * torch.randn(1100, rank, generator=generator) @ torch.randn(rank, 2300, generator=generator)
        for _ in range(3)
    ]
    task_vectors = StoredTaskVectors(base, [Expert(name=str(t), tensor=tensor) for t, tensor in enumerate(experts)])
    looked_at = []
    monkeypatch.setattr(
        task_vectors, "task_vector", lambda t: looked_at.append(t) or StoredTaskVectors.task_vector(task_vectors, t)
    )
    assert low_rank_share(task_vectors) == (1.0 if rank == 8 else 0.0)
    assert looked_at == ([0, 1, 2] if rank == 8 else [])
