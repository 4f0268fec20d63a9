"""The contenders' formulas on matrices small enough to work out by hand, and as methods of mergekit."""

import pytest
import torch
from mergekit.merge_methods.api import merge_tensors

from benchmarks.experiment.contenders import (
    calibrated_sum,
    consensus_sum,
    knots_ties,
    norm_weighted_mean,
    regression_mean,
    robust_factors,
    spectral_truncated_mean,
)
from benchmarks.experiment.contending import CONTENDERS, register_contenders
from tests.linalg.matrices import of_rank

FIRST = torch.diag(torch.tensor([1.0, 0.0]))
SECOND = torch.diag(torch.tensor([0.0, 2.0]))


def test_calibration_by_hand() -> None:
    # Each direction is one expert's alone, and the other's counts as a tenth: g = 2 / 1.1.
    merged = calibrated_sum([FIRST, SECOND])
    torch.testing.assert_close(merged, (FIRST + SECOND) * (2 / 1.1))
    # Along the one direction X is 4, which is 4 and 4/3 times the experts': g = 2 / (4 + 4/3).
    torch.testing.assert_close(calibrated_sum([FIRST, 3 * FIRST]), 4 * FIRST * 2 / (4 + 4 / 3))


def test_calibration_of_one_expert_said_twice_is_that_expert() -> None:
    update = of_rank(12, 9, 5, seed=3)
    torch.testing.assert_close(calibrated_sum([update, update, update]), update)


def test_consensus_by_hand() -> None:
    updates = [torch.tensor([[2.0, 3.0, -1.0]]), torch.tensor([[2.0, 0.5, 3.0]])]
    # 3 > 0.4 * 0.5 alone, |-1| < 0.4 * 3: one claim each in the last two.
    torch.testing.assert_close(consensus_sum(updates), torch.tensor([[4.0, 0.0, 0.0]]))


@pytest.mark.parametrize(("exponent", "first"), [(-1.0, 2 / 3), (0.0, 1 / 2), (2.0, 1 / 5)])
def test_norm_weights_by_hand(exponent: float, first: float) -> None:
    expected = torch.diag(torch.tensor([first, 2 * (1 - first)]))
    torch.testing.assert_close(norm_weighted_mean([FIRST, SECOND], exponent=exponent), expected)


def test_knots_by_hand() -> None:
    updates = [torch.tensor([[2.0, 1.0]]), torch.tensor([[-1.0, -3.0]])]
    torch.testing.assert_close(knots_ties(updates, density=0.5), torch.tensor([[2.0, -3.0]]))
    # Untrimmed: the sums are 1 and -2, and those of their sign are 2 and -3.
    torch.testing.assert_close(knots_ties(updates, density=1.0), torch.tensor([[2.0, -3.0]]))
    update = of_rank(12, 9, 5, seed=3)
    torch.testing.assert_close(knots_ties([update, update], density=1.0), update)


def test_star_by_hand() -> None:
    # 3 of 4 is more than 40 percent, and is scaled to the whole of 4; the other has one direction.
    merged = spectral_truncated_mean([torch.diag(torch.tensor([3.0, 1.0])), SECOND])
    torch.testing.assert_close(merged, torch.diag(torch.tensor([2.0, 1.0])))


def test_regression_mean_by_hand() -> None:
    # Nine tenths of the first moment's 10 are kept: (D_1 S_1 + D_2 S_2) (S_1 + S_2)^-1 with S_1 = [[20, 9], [9, 10]].
    D = [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]])]
    C = [torch.tensor([[20.0, 10.0], [10.0, 10.0]]), torch.tensor([[0.0, 0.0], [0.0, 40.0]])]
    # the numerator is [38, 29] + [0, -40], and the system [[20, 9], [9, 50]]
    expected = torch.tensor([[38.0, -11.0]]) @ torch.tensor([[50.0, -9.0], [-9.0, 20.0]]) / (20 * 50 - 81)
    torch.testing.assert_close(regression_mean(D, C), expected)


def test_regression_mean_of_inputs_that_are_always_zero_is_finite() -> None:
    C = [torch.diag(torch.tensor([1.0, 0.0])), torch.diag(torch.tensor([3.0, 0.0]))]
    merged = regression_mean([torch.tensor([[1.0, 5.0]]), torch.tensor([[5.0, 1.0]])], C)
    torch.testing.assert_close(merged, torch.tensor([[4.0, 0.0]]))


def test_robust_merge_by_hand() -> None:
    # The third smallest of four is the threshold, and stays: 4 and 3 of A_1, 6 and 6 of A_2. Of their rows
    # are left 4/5, 3/5, 6/8 and 6/8.
    A = [torch.tensor([[4.0, 1.0], [2.0, 3.0]]), torch.tensor([[6.0, 2.0], [-2.0, -6.0]])]
    B = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[-5.0, 1.0], [1.5, 6.0]])]
    down, up = robust_factors(A, B, density=0.25, weight=2.0, floor=0.0)
    torch.testing.assert_close(down, torch.tensor([[20.0, 0.0], [0.0, -6.0]]))
    first, second = torch.tensor([5 / 4, 5 / 3]), torch.tensor([8 / 6, 8 / 6])
    kept = [torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[-5.0, 0.0], [0.0, 6.0]])]
    torch.testing.assert_close(up, 2 * (first * kept[0] + second * kept[1]) / (first + second))
    # With a floor at the larger of an expert's two scales, both are that one.
    _, up = robust_factors(A, B, density=0.25, weight=2.0, floor=0.5)
    torch.testing.assert_close(up, 2 * (kept[0] * 5 / 3 + kept[1] * 8 / 6) / 3)


@pytest.mark.parametrize("method", CONTENDERS, ids=lambda method: method.name)
def test_a_contender_merges_through_mergekit(method) -> None:  # type: ignore[no-untyped-def]
    register_contenders()
    register_contenders()
    base, first, second = (of_rank(12, 9, 9, seed=seed) for seed in range(3))
    merged = merge_tensors([base, base + first, base + second], method.name, base_index=0, name="layers.0.weight")
    parameters = {"exponent": -1.0}
    torch.testing.assert_close(merged, base + method.formula([first, second], parameters))
