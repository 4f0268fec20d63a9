"""The second moment of sampled inputs against its definition, and the estimate of its error against draws."""

import pytest
import torch
from torch import Tensor

from mergekit_ace.moments.statistics import second_moment


def drawn(prompts: int, tokens: int, n: int, seed: int, within: float = 0.0) -> list[Tensor]:
    """Inputs of some prompts; `within` is what the inputs of one prompt have in common."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n, n, generator=torch.Generator().manual_seed(99)) / n**0.5
    common = [within * torch.randn(1, n, generator=generator) for _ in range(prompts)]
    return [(torch.randn(tokens, n, generator=generator) + shift) @ mixing for shift in common]


@pytest.mark.parametrize("tokens", [5, 40])
def test_the_factor_is_of_the_mean_product(tokens: int) -> None:
    """With fewer tokens than inputs, and with more; prompts of different lengths."""
    samples = drawn(3, tokens, 32, seed=0)
    samples[1] = samples[1][:3]
    moment = second_moment(samples)
    rows = torch.cat(samples).double()
    expected = rows.T @ rows / len(rows)
    assert moment.factor.shape == (min(len(rows), 32), 32)
    assert (moment.tokens, moment.prompts) == (len(rows), 3)
    torch.testing.assert_close(moment.factor.double().T @ moment.factor.double(), expected, rtol=0, atol=1e-6)


def test_the_factor_does_not_depend_on_the_order_of_tokens() -> None:
    """Up to the signs of its rows, which a QR decomposition leaves open: the tokens cannot be read from it."""
    (rows,) = drawn(1, 20, 32, seed=1)
    one, other = second_moment([rows]).factor, second_moment([rows.flip(0)]).factor
    signs = one.diagonal().sign() * other.diagonal().sign()
    torch.testing.assert_close(one, signs[:, None] * other, rtol=0, atol=1e-4)
    assert torch.equal(one, one.triu())


def off_diagonal(matrix: Tensor) -> Tensor:
    return matrix - torch.diag(torch.diagonal(matrix))


@pytest.mark.parametrize("within", [0.0, 1.0])
def test_the_error_is_what_draws_show(within: float) -> None:
    """Mean of the estimate over draws, against the share of the off-diagonal energy that differs from the truth."""
    n, prompts, tokens = 24, 16, 8
    mixing = torch.randn(n, n, generator=torch.Generator().manual_seed(99)).double() / n**0.5
    truth = (1 + within**2) * mixing.T @ mixing
    estimated, missed, energy = 0.0, 0.0, 0.0
    for seed in range(40):
        samples = drawn(prompts, tokens, n, seed, within)
        rows = torch.cat(samples).double()
        measured = off_diagonal(rows.T @ rows / len(rows))
        estimated += second_moment(samples).error / 40
        missed += float((measured - off_diagonal(truth)).square().sum())
        energy += float(measured.square().sum())
    assert estimated == pytest.approx(missed / energy, rel=0.1)


def test_a_single_prompt_counts_as_two_halves() -> None:
    (rows,) = drawn(1, 30, 8, seed=3)
    assert second_moment([rows]).error == second_moment([rows[:15], rows[15:]]).error > 0


def test_inputs_without_correlation_have_no_off_diagonal_to_trust() -> None:
    assert second_moment([torch.eye(4)[:2], torch.eye(4)[2:]]).error == 1


def test_equal_prompts_are_not_without_error() -> None:
    """They are one sample of the task, however often it is repeated."""
    (rows,) = drawn(1, 4, 8, seed=5)
    assert second_moment([rows] * 5).error == 1 / 21
