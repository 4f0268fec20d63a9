"""Passes in pieces see every element once."""

import pytest
import torch

from mergekit_ace.linalg.blocks import blocks
from mergekit_ace.linalg.precision import squared_norm


@pytest.mark.parametrize("shape", [(), (0, 5), (1,), (300_000,), (7, 100_000), (1000, 700), (3, 400, 500)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squared_norm_of_any_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert squared_norm(tensor) == pytest.approx(float(tensor.double().square().sum()), rel=1e-12)
    assert sum(block.numel() for block in blocks(tensor)) == tensor.numel()


def test_blocks_write_through() -> None:
    tensor = torch.zeros(1000, 700).T
    for block in blocks(tensor):
        block.add_(1)
    assert bool((tensor == 1).all())


def test_float32_values_neither_overflow_nor_vanish() -> None:
    assert squared_norm(torch.tensor([1e30, 1e30])) == pytest.approx(2e60)
    assert squared_norm(torch.tensor([1e-30])) == pytest.approx(1e-60)
