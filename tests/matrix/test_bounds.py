"""How far experts agree, how long their merge may be, and what it is scaled by: numbers that follow by hand."""

import math

import pytest
import torch
from torch import Tensor

from mergekit_ace.matrix.balanced import averaged_share, merge_balanced
from mergekit_ace.matrix.bounds import effective_experts, large_share, longest_allowed, mean_energy, scale_factor
from mergekit_ace.matrix.expert import Expert
from mergekit_ace.matrix.stored_task_vectors import StoredTaskVectors
from mergekit_ace.matrix.task_vectors import TaskVectors


def entry(row: int, column: int, size: float) -> Tensor:
    update = torch.zeros(4, 3, dtype=torch.float64)
    update[row, column] = size
    return update


def vectors(*updates: Tensor, weights: tuple[float, ...] = (1.0, 1.0), base: float = 0.0) -> TaskVectors:
    """Around a base whose entries are all equal."""
    start = torch.full((4, 3), base, dtype=torch.float64)
    experts = [
        Expert(name=str(t), tensor=start + u, weight=w) for t, (u, w) in enumerate(zip(updates, weights, strict=True))
    ]
    return StoredTaskVectors(start, experts)


ORTHOGONAL = vectors(entry(0, 0, 3.0), entry(1, 1, 4.0))
# shares 1/2 and 3/2
WEIGHTED = vectors(entry(0, 0, 3.0), entry(1, 1, 4.0), weights=(1.0, 3.0))


def test_how_many_independent_updates_experts_amount_to() -> None:
    assert effective_experts(vectors(entry(0, 0, 2.0), entry(1, 1, 2.0))) == pytest.approx(2.0)
    assert effective_experts(vectors(entry(0, 0, 2.0), entry(0, 0, 2.0))) == 1.0
    # mean energy (9 + 16) / 2, energy of the mean (9 + 16) / 4
    assert effective_experts(ORTHOGONAL) == pytest.approx(2.0)
    assert mean_energy(ORTHOGONAL) == pytest.approx(12.5)
    # (9 / 2 + 3 * 16 / 2) / 2, and 9 / 16 + 9 * 16 / 16
    assert mean_energy(WEIGHTED) == pytest.approx(14.25)
    assert effective_experts(WEIGHTED) == pytest.approx(14.25 / 9.5625)
    # Of opposing updates no more than T^2.
    assert effective_experts(vectors(entry(0, 0, 2.0), entry(0, 0, -2.0))) == 4.0
    assert effective_experts(vectors(entry(0, 0, 2.0), entry(0, 0, -1.9))) == 4.0
    # mean energy 2.5, energy of the mean 0.25
    three = vectors(entry(0, 0, 2.0), entry(0, 0, -1.0), entry(0, 0, 0.5), weights=(1.0, 1.0, 1.0))
    assert effective_experts(three) == pytest.approx((5.25 / 3) / 0.25)


def test_how_long_a_merge_may_be() -> None:
    assert longest_allowed(ORTHOGONAL, "none", independent=2.0, low_rank=0.0) == math.inf
    assert longest_allowed(ORTHOGONAL, "end_to_end", independent=None, low_rank=0.0) == math.inf
    # twice 3 + 4; with the shares twice 3 / 2 + 3 * 4 / 2
    for bound in ("end_to_end", "by_size"):
        assert longest_allowed(ORTHOGONAL, bound, independent=2.0, low_rank=0.0) == pytest.approx(14.0)
        assert longest_allowed(WEIGHTED, bound, independent=2.0, low_rank=0.0) == pytest.approx(15.0)
    assert longest_allowed(ORTHOGONAL, "orthogonal", independent=2.0, low_rank=0.0) == pytest.approx(5.0)
    adapters = math.sqrt(math.sqrt(2.0) * 12.5)
    for bound in ("end_to_end", "orthogonal"):
        assert longest_allowed(ORTHOGONAL, bound, independent=2.0, low_rank=1.0) == pytest.approx(adapters)
    # the geometric mean between
    between = longest_allowed(ORTHOGONAL, "orthogonal", independent=2.0, low_rank=0.25)
    assert between == pytest.approx(5.0**0.75 * adapters**0.25)
    # Never longer than without low rank.
    small = vectors(entry(0, 0, 3.0), entry(0, 0, 3.0))
    assert longest_allowed(small, "orthogonal", independent=0.5, low_rank=1.0) == pytest.approx(math.sqrt(4.5))


def test_what_a_merge_is_scaled_by() -> None:
    assert scale_factor(2.0, retention=None, longest=4.0) == 1.0
    assert scale_factor(2.0, retention=0.5, longest=4.0) == 1.0
    assert scale_factor(2.0, retention=4.0, longest=4.0) == 0.25
    assert scale_factor(2.0, retention=4.0, longest=4.0, retained=0.5) == 0.5
    assert scale_factor(8.0, retention=None, longest=4.0) == 0.5
    assert scale_factor(8.0, retention=2.0, longest=2.0) == 0.25
    # 8 is more than 2: as far as the updates are large, 8^(1 - w) 2^w
    assert scale_factor(8.0, retention=None, longest=99.0, held=2.0, large=1.0) == 0.25
    assert scale_factor(8.0, retention=None, longest=99.0, held=2.0, large=0.5) == 0.5
    # after the retention has halved it
    assert scale_factor(8.0, retention=2.0, longest=99.0, held=1.0, large=0.5) == 0.25
    assert scale_factor(8.0, retention=2.0, longest=99.0, held=5.0, large=1.0) == 0.5
    assert scale_factor(8.0, retention=None, longest=99.0, held=2.0, large=0.0) == 1.0
    assert scale_factor(0.0, retention=4.0, longest=0.0, held=0.0, large=1.0) == 0.25


def test_how_large_updates_are_for_their_base() -> None:
    # ||W_0||^2 = 12 * 100; mean energy 12.5, of two orthogonal updates: so much is noise to each
    near = vectors(entry(0, 0, 3.0), entry(1, 1, 4.0), base=10.0)
    assert averaged_share(near) == pytest.approx(12.5 / (12.5 + 0.01 * 1200))
    assert averaged_share(vectors(entry(0, 0, 3.0), entry(0, 0, 3.0), base=10.0)) == 0.0
    size = math.sqrt(12.5 / 1200)
    for depth in (1, 12, 80):
        near.depth = depth
        assert large_share(near) == pytest.approx(size**4 / (size**4 + (0.125 / math.sqrt(depth)) ** 4))
    near.depth = None
    assert large_share(near) == pytest.approx(size**4 / (size**4 + 0.125**4 / 32**2))
    tiny = vectors(entry(0, 0, 1e-3), entry(0, 0, 1e-3))
    tiny.base_norm = 1e300
    assert 0 < large_share(tiny) < 1e-30
    assert averaged_share(ORTHOGONAL) == large_share(ORTHOGONAL) == 1.0
    assert large_share(vectors(entry(0, 0, 0.0), entry(0, 0, 1.0))) == 1.0
    near.base_norm = None
    assert averaged_share(near) == large_share(near) == 0.0


def test_balanced_updates() -> None:
    """Orthogonal updates of rank one stay as they are but for their lengths: weights 1 / sqrt(norm), mean 1."""
    raw = [3**-0.5, 4**-0.5]
    a = [2 * weight / sum(raw) for weight in raw]
    torch.testing.assert_close(merge_balanced(ORTHOGONAL), entry(0, 0, a[0] * 3) + entry(1, 1, a[1] * 4))
    # Equal updates give that update.
    torch.testing.assert_close(merge_balanced(vectors(entry(0, 0, 2.0), entry(0, 0, 2.0))), entry(0, 0, 2.0))
