"""A given rank: what is kept of the merged update, and how it is reported."""

import pytest
import torch
from torch import Tensor

from mergekit_ace.adapters.truncation import Truncation, input_weight, outputs_kept
from mergekit_ace.linalg.factors import Factors

P, Q = 9, 7


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def update(seed: int, rank: int = 2) -> Factors:
    return Factors(left=drawn(P, rank, seed=seed), right=drawn(rank, Q, seed=seed + 10))


def test_no_update_of_the_rank_is_nearer_as_the_experts_inputs_see_it() -> None:
    factors = [update(t) for t in range(3)]
    updates = [each.matrix() for each in factors]
    merged = drawn(P, Q, seed=20)
    weight, back = input_weight(factors, [1.0, 2.0, 1.0])
    torch.testing.assert_close(weight @ back, torch.eye(Q, dtype=torch.float64))
    expected = sum(w * d.mT @ d / d.square().sum() for w, d in zip((1.0, 2.0, 1.0), updates, strict=True))
    level = expected.trace() / Q
    torch.testing.assert_close(weight @ weight, expected + 0.1 * level * torch.eye(Q, dtype=torch.float64))
    cut = Truncation(merged, (weight, back)).of_rank(3)
    assert torch.linalg.matrix_rank(cut) == 3
    own = torch.linalg.svdvals(merged @ weight)[3:].square().sum()
    torch.testing.assert_close(((merged - cut) @ weight).square().sum(), own)
    nearest = Truncation(merged, None).of_rank(3)
    torch.testing.assert_close((merged - nearest).square().sum(), torch.linalg.svdvals(merged)[3:].square().sum())
    assert ((merged - nearest) @ weight).square().sum() > own


def test_auto_is_the_smallest_rank_that_keeps_enough() -> None:
    left, right = torch.linalg.qr(drawn(P, Q, seed=1))[0], torch.linalg.qr(drawn(Q, Q, seed=2))[0]
    # Shares of the energy: 0.8, 0.15, 0.045, then 0.005 in all.
    shares = torch.tensor([0.8, 0.15, 0.045, 0.002, 0.001, 0.001, 0.001], dtype=torch.float64)
    merged = (left * shares.sqrt()) @ right.mT
    cut = Truncation(merged, None)
    assert [cut.rank_to_keep(kept) for kept in (0.5, 0.9, 0.99, 0.996)] == [1, 2, 3, 4]
    weighted = Truncation(merged, input_weight([update(5, rank=Q)], [1.0]))
    rank = weighted.rank_to_keep(0.99)
    kept = [1 - float((merged - weighted.of_rank(r)).square().sum()) for r in range(1, Q + 1)]
    assert kept[rank - 1] >= 0.99
    assert max(kept[: rank - 1]) < 0.99
    assert Truncation(torch.zeros(3, 3), None).rank_to_keep() == 1


def test_outputs_kept_are_those_on_the_experts_own_inputs() -> None:
    factors = [update(t) for t in range(2)]
    updates = [each.matrix() for each in factors]
    assert outputs_kept(updates[0], factors)[0] == pytest.approx(1.0)
    assert outputs_kept(updates[0] * 0.25, factors)[0] == pytest.approx(0.25)
    nothing = Factors(left=torch.zeros_like(factors[0].left), right=factors[0].right)
    assert outputs_kept(updates[0], [nothing]) == [1.0]
    merged = drawn(P, Q, seed=20)
    moment = updates[1].mT @ updates[1]
    expected = (merged @ moment @ updates[1].mT).trace() / (updates[1] @ moment @ updates[1].mT).trace()
    torch.testing.assert_close(outputs_kept(merged, factors)[1], float(expected))
