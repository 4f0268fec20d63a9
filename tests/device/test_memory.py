"""What a device needs beyond the inputs: no more than the estimate of `check`, and no more than the text says."""

import pytest
import torch

from mergekit_ace.linalg import blocks as module
from mergekit_ace.linalg.blocks import LARGEST_BLOCK, blocks
from mergekit_ace.linalg.precision import all_finite, inner_products, squared_norm
from mergekit_ace.matrix import workload
from tests.device.pretended import AVAILABLE, PretendedAccelerator
from tests.family.cases import cases, drawn

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="this torch cannot be given a device in Python")

ROWS, COLUMNS, BLOCK = 300, 200, 1000
# Sums and the like, of a few numbers each.
SCALARS = 1024


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of many blocks that takes no minute."""
    monkeypatch.setattr(module, "LARGEST_BLOCK", BLOCK)
    monkeypatch.setattr(workload, "LARGEST_BLOCK", BLOCK)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("dtype", "each"), [(torch.bfloat16, 6), (torch.float32, 4), (torch.float64, 8)], ids=str)
@pytest.mark.parametrize("choice", ["average", "base"])
def test_a_table_needs_its_result_and_its_mean_update(dtype: torch.dtype, each: int, choice: str) -> None:
    base, experts = drawn(3, ROWS, COLUMNS, dtype=dtype)
    with PretendedAccelerator() as accelerator:
        on_device = [accelerator.place(tensor, "gpu:0") for tensor in (base, *experts)]
        next(cases()).merge(on_device[0], on_device[1:], name="model.embed_tokens.weight", embeddings=choice)
    estimate = workload.averaging_bytes(base.numel(), dtype)
    assert estimate <= each * base.numel() + 24 * BLOCK
    assert accelerator.peak <= estimate + SCALARS
    if choice == "average":
        assert accelerator.peak >= each * base.numel()


@pytest.mark.usefixtures("small_blocks")
def test_a_norm_needs_one_block() -> None:
    with PretendedAccelerator() as accelerator:
        tensor = accelerator.place(torch.ones(ROWS, COLUMNS, dtype=torch.bfloat16), "gpu:0")
        assert squared_norm(tensor) == ROWS * COLUMNS
        assert float(inner_products([(tensor, tensor.clone())])) == ROWS * COLUMNS
        assert all_finite(tensor)
    assert accelerator.peak <= 2 * ROWS * COLUMNS + 2 * 8 * BLOCK + SCALARS


@pytest.mark.parametrize("shape", [(2**31 + 5,), (1, 2**31 + 5), (128_256, 8192 * 3), (3, 1 << 15, 1 << 15)], ids=str)
def test_blocks_of_a_device_are_some_and_not_thousands(shape: tuple[int, ...]) -> None:
    """cuBLAS takes no more than `2^31 - 1` elements at once."""
    with PretendedAccelerator() as accelerator:
        one = accelerator.place(torch.ones((), dtype=torch.bfloat16), "gpu:0")
        pieces = blocks(one.expand(shape))
    elements = torch.Size(shape).numel()
    assert max(piece.numel() for piece in pieces) <= LARGEST_BLOCK
    assert sum(piece.numel() for piece in pieces) == elements
    assert elements / LARGEST_BLOCK <= len(pieces) <= 4 * elements / LARGEST_BLOCK
