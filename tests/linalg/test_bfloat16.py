"""Products with factors in bfloat16: their error, and when they are chosen."""

import pytest
import torch

from mergekit_ace.linalg import bfloat16

CPU = torch.device("cpu")


def test_the_error_is_as_documented() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(300, 300, generator=generator, dtype=torch.float64) for _ in range(2))
    exact = left @ right
    error = float((bfloat16.product(left.float(), right.float()).double() - exact).square().sum())
    factors = 2 * float(left.square().sum() * right.square().sum()) / 300
    assert error == pytest.approx(bfloat16.ROUNDING**2 * (factors + float(exact.square().sum())), rel=0.1)


def test_a_product_is_taken_when_its_estimate_is_within_what_is_allowed() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(60, 300, generator=generator), torch.randn(300, 80, generator=generator)
    # rows of very different size meet columns of the inverse size
    sizes = 10 ** torch.linspace(-3, 3, 300)
    left, right = left * sizes, right / sizes[:, None]
    exact = left.double() @ right.double()
    found, estimate = bfloat16.product_within(left, right, 1e9)
    assert found is not None
    assert float((found.double() - exact).norm()) == pytest.approx(estimate, rel=0.1)
    assert bfloat16.product_within(left, right, estimate)[1] == estimate
    assert bfloat16.product_within(left, right, 0.99 * estimate) == (None, 0.0)
    assert bfloat16.product_within(left, right, 0.1 * estimate) == (None, 0.0)


def test_factors_that_are_exact_in_bfloat16_add_no_error() -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randint(-255, 256, (200, 300), generator=generator).float()
    right = torch.randn(300, 80, generator=generator)
    columns, rows = bfloat16.FactorSizes.of_columns([left[:150], left[150:]]), bfloat16.FactorSizes.of_rows(right)
    assert float(columns.lost.sum()) == 0
    torch.testing.assert_close(columns.squares, left.double().square().sum(dim=0))
    exact = left.double() @ right.double()
    error = float((left.double() @ right.bfloat16().double() - exact).square().sum())
    assert columns.error_with(rows) == pytest.approx(error, rel=0.1)
    found, estimate = bfloat16.product_within(left, right, 1e9)
    assert found is not None
    assert float((found.double() - exact).norm()) == pytest.approx(estimate, rel=0.1)


def test_a_tall_product_is_estimated_from_some_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat16, "_ENOUGH", 400)
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(1500, 40, generator=generator), torch.randn(40, 50, generator=generator)
    assert [bfloat16.row_step(rows) for rows in (300, 799, 800, 1199, 1500)] == [1, 1, 2, 2, 3]
    found, estimate = bfloat16.product_within(left, right, 1e9)
    assert found is not None
    error = float((found.double() - left.double() @ right.double()).norm())
    assert error == pytest.approx(estimate, rel=0.1)


def test_they_are_chosen_by_what_the_processor_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for known, expected in (({}, False), ({"avx512_f": True}, False), ({"avx512_bf16": True}, True)):
        bfloat16._multiplies.cache_clear()
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=known: known, raising=False)
        assert bfloat16.is_faster(CPU, 512, 256) is expected
        assert not bfloat16.is_faster(CPU, 512, 255)
        assert not bfloat16.is_faster(torch.device("cuda"), 512, 512)
    bfloat16._multiplies.cache_clear()
    with torch.device("meta"):
        assert bfloat16.is_faster(CPU, 512, 512)
    bfloat16._multiplies.cache_clear()
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not bfloat16.is_faster(CPU, 512, 512)
    bfloat16._multiplies.cache_clear()


def test_sums_that_are_rounded_on_the_way_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    bfloat16._multiplies.cache_clear()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    monkeypatch.setattr(bfloat16, "product", lambda left, right: torch.ones(left.shape[0], right.shape[1]))
    assert not bfloat16.is_faster(CPU, 512, 512)
    bfloat16._multiplies.cache_clear()
