"""The reference itself, against values with closed forms and against the limits its page states."""

import math

import pytest
import torch

from tests.reference import AceOptions, ace, actmat, cart, heterogeneity, iso_c, iso_cts, tsv_m, wudi_closed_form

HOMOGENEOUS = AceOptions(heterogeneity_threshold=math.inf)
NO_PRIOR = AceOptions(heterogeneity_threshold=math.inf, structural_prior=False)


def updates(count: int, m: int, n: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(m, n, dtype=torch.float64, generator=generator) for _ in range(count)]


def test_heterogeneity_of_two_norms_by_hand() -> None:
    """`l = (2, 4)`: variance 2, mean 3, so 2/9."""
    D = [torch.full((1, 1), math.exp(1.0)), torch.full((1, 1), math.exp(2.0))]
    assert heterogeneity(D) == pytest.approx(2 / 9, rel=1e-6)


def test_one_column_by_hand() -> None:
    """`n = 1`, no prior: scalars, `sum c_t (g_t + eps) / sum (g_t + eps)`."""
    D = [torch.tensor([[1.0], [-1.0]]), torch.tensor([[2.0], [-2.0]])]
    merged = ace(D, AceOptions(heterogeneity_threshold=math.inf, structural_prior=False, epsilon=1.0))
    expected = (1 * (2 + 1) + 2 * (8 + 1)) / ((2 + 1) + (8 + 1))
    torch.testing.assert_close(merged, torch.tensor([[expected], [-expected]], dtype=torch.float64))


def test_identical_experts_give_the_centered_expert() -> None:
    D = updates(1, 7, 5)[0]
    torch.testing.assert_close(ace([D, D.clone(), D.clone()], NO_PRIOR), D - D.mean(dim=0))


def test_a_large_ridge_gives_the_mean_of_the_centered_updates() -> None:
    D = updates(3, 6, 4)
    mean = sum(D) / 3
    merged = ace(D, AceOptions(heterogeneity_threshold=math.inf, epsilon=1e12))
    torch.testing.assert_close(merged, mean - mean.mean(dim=0), rtol=1e-8, atol=1e-9)


def test_integer_weights_count_copies_where_nothing_else_counts_experts() -> None:
    """Homogeneous and without a prior, weight 2 for an expert is the expert listed twice."""
    first, second = updates(2, 6, 5)
    torch.testing.assert_close(ace([first, second], NO_PRIOR, [2.0, 1.0]), ace([first, first, second], NO_PRIOR))


def test_experts_without_information_or_weight_are_left_out() -> None:
    D = updates(3, 5, 6)
    zero = torch.zeros_like(D[0])
    torch.testing.assert_close(ace([D[0], zero, D[1]]), ace(D[:2]))
    torch.testing.assert_close(ace(D, weights=[1.0, 1.0, 0.0]), ace(D[:2]))
    assert torch.equal(ace([zero, D[2]]), D[2])
    assert torch.equal(ace([zero, zero]), zero)


@pytest.mark.parametrize("options", [AceOptions(heterogeneity_threshold=0), HOMOGENEOUS], ids=["gate on", "gate off"])
def test_refinement_follows_the_gate(options: AceOptions) -> None:
    D = updates(3, 12, 10)
    refined = ace(D, options)
    plain = ace(D, AceOptions(heterogeneity_threshold=options.heterogeneity_threshold, spectral_fraction=0))
    added = torch.linalg.svdvals(refined - plain)
    if options is HOMOGENEOUS:
        assert torch.equal(refined, plain)
    else:  # three equal singular values are added, no more
        torch.testing.assert_close(added[:3], added[0].expand(3))
        assert added[3] < 1e-12 * added[0]


def test_peers_agree_with_orthogonal_experts() -> None:
    """Experts in orthogonal input and output subspaces do not interfere: every solver adds them up."""
    first, second = torch.zeros(2, 8, 8, dtype=torch.float64)
    first[:4, :4], second[4:, 4:] = updates(2, 4, 4)
    both = first + second
    torch.testing.assert_close(actmat([first, second]), both)
    torch.testing.assert_close(wudi_closed_form([first, second]), both)
    torch.testing.assert_close(tsv_m([first, second]), both)


def test_isotropic_peers_flatten_the_spectrum() -> None:
    D = updates(4, 10, 20)
    values = torch.linalg.svdvals(iso_c(D))
    torch.testing.assert_close(values, torch.linalg.svdvals(sum(D)).mean().expand(10))
    flattened = torch.linalg.svdvals(iso_cts(D, common_fraction=0.6))
    torch.testing.assert_close(flattened, flattened[0].expand(10))


def test_cart_at_full_rank_is_the_average_plus_deviations_that_cancel() -> None:
    D = updates(3, 6, 4)
    torch.testing.assert_close(cart(D, rank=4), sum(D) / 3)
