"""Symmetric products by their upper half are the whole products."""

import pytest
import torch

from mergekit_ace.linalg.symmetric import _blocks_of, add_gram_upper_, add_to_diagonal_, gram, mirror_upper_


@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 5), (7, 191), (30, 500), (900, 450)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gram_is_the_product_and_exactly_symmetric(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    product = gram(rows)
    assert torch.equal(product, product.T)
    torch.testing.assert_close(product, rows.T @ rows)
    torch.testing.assert_close(gram(rows.mT), rows @ rows.T)


def test_blocks_are_small_on_a_cpu_and_few_on_an_accelerator() -> None:
    """On the diagonal; the others are beside them."""

    def sides(device: str, size: int) -> list[int]:
        found = list(_blocks_of(torch.empty(size, size, device=device)))
        assert len(found) == 2 * sum(above == beside for above, beside in found) - 1
        return [above.stop - above.start for above, beside in found if above == beside]

    assert sides("cpu", 383) == [383]
    assert sides("cpu", 384) == [192, 192]
    assert sides("cpu", 2000) == [250] * 8
    assert sides("meta", 383) == [383]
    assert sides("meta", 2000) == [500] * 4


def test_scaled_products_accumulate() -> None:
    first, second = torch.randn(2, 10, 700, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    total = torch.zeros(700, 700, dtype=torch.float64)
    add_gram_upper_(total, first, scale=2.0)
    add_gram_upper_(total, second, scale=0.5)
    add_to_diagonal_(mirror_upper_(total), 3.0)
    wanted = 2 * first.T @ first + 0.5 * second.T @ second + 3 * torch.eye(700, dtype=torch.float64)
    torch.testing.assert_close(total, wanted)


def test_a_target_that_is_not_kept_may_hold_anything() -> None:
    target = torch.full((4, 4), float("nan"))
    rows = torch.eye(4)
    torch.testing.assert_close(add_gram_upper_(target, rows, keep=0.0), torch.eye(4))
