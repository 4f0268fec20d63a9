"""Passes in pieces see every element once, and no piece is larger than it may be."""

import pytest
import torch

from mergekit_ace.linalg import blocks as module
from mergekit_ace.linalg.blocks import blocks
from mergekit_ace.linalg.precision import all_finite, inner_products, squared_norm, squared_norms

SHAPES = [(), (0, 5), (1,), (300_000,), (7, 100_000), (1000, 700), (3, 400, 500), (1, 1, 300_000), (2, 3, 4, 50_000)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squared_norm_of_any_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert squared_norm(tensor) == pytest.approx(float(tensor.double().square().sum()), rel=1e-12)
    assert float(inner_products([(tensor, 2 * tensor)])) == pytest.approx(2 * squared_norm(tensor), rel=1e-12)
    assert squared_norms([tensor, -tensor]).tolist() == 2 * [squared_norm(tensor)]
    assert sum(block.numel() for block in blocks(tensor)) == tensor.numel()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pieces_are_whole_rows_of_limited_size(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.zeros(shape)
    pieces = blocks(tensor)
    longest_row = shape[-1] if len(shape) > 1 else 1
    assert max(piece.numel() for piece in pieces) <= max(1 << 17, longest_row)
    if len(shape) == 2:
        assert all(piece.shape[1:] == tensor.shape[1:] for piece in pieces)
    # Rows longer than any block are cut all the same.
    monkeypatch.setattr(module, "LARGEST_BLOCK", 200_000)
    assert max(piece.numel() for piece in blocks(tensor)) <= 200_000


def test_blocks_write_through() -> None:
    tensor = torch.zeros(1000, 700).T
    for block in blocks(tensor):
        block.add_(1)
    assert bool((tensor == 1).all())


def test_float32_values_neither_overflow_nor_vanish() -> None:
    assert squared_norm(torch.tensor([1e30, 1e30])) == pytest.approx(2e60)
    assert squared_norm(torch.tensor([1e-30])) == pytest.approx(1e-60)


@pytest.mark.parametrize("place", [0, 150_000, 299_999])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_what_is_not_finite_is_found_anywhere(place: int, value: float) -> None:
    tensor = torch.full((300_000,), torch.finfo(torch.float32).max)
    assert all_finite(tensor)
    tensor[place] = value
    assert not all_finite(tensor)
