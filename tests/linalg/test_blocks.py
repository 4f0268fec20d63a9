"""Passes in pieces see every element once, and no piece is larger than it may be."""

import pytest
import torch

from mergekit_ace.linalg import blocks as module
from mergekit_ace.linalg.blocks import blocks, panels, row_slices
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


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((8,), [8]),
        ((9,), [8, 1]),
        ((2, 4), [8]),
        ((3, 4), [8, 4]),
        ((3, 5), [5, 5, 5]),
        # Rows are whole up to the largest block, and what has more axes is cut along the next.
        ((2, 16), [16, 16]),
        ((2, 17), [8, 8, 1, 8, 8, 1]),
        ((2, 2, 4), [8, 8]),
        ((2, 3, 4), [8, 4, 8, 4]),
    ],
    ids=str,
)
def test_where_tensors_are_cut(shape: tuple[int, ...], sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ON_THE_CPU", 8)
    monkeypatch.setattr(module, "LARGEST_BLOCK", 16)
    assert [block.numel() for block in blocks(torch.zeros(shape))] == sizes
    on_device = blocks(torch.zeros(shape, device="meta"))
    assert max(block.numel() for block in on_device) <= 16
    assert len(on_device) <= len(sizes)


def test_pieces_for_products() -> None:
    assert row_slices(10, 4, most=12) == [slice(0, 3), slice(3, 6), slice(6, 9), slice(9, 10)]
    assert row_slices(2, 4, most=3) == [slice(0, 1), slice(1, 2)]
    assert row_slices(5, 1, most=3) == [slice(0, 3), slice(3, 5)]
    assert row_slices(5, 0) == [slice(0, 5)]
    assert row_slices(0, 4) == []
    # 2^22 elements, or 1024 rows; 2^26 elements on a device, and of rows that are longer.
    assert panels(torch.empty(5000, 1024))[0].stop == 4096
    assert panels(torch.empty(5000, 8192))[0].stop == 1024
    assert panels(torch.empty(5000, 8192, device="meta"))[0].stop == 5000
    assert panels(torch.empty(50_000, 8192, device="meta"))[0].stop == 8192


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
