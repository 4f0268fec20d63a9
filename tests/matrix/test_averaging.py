"""The mean of tensors that are not matrices, and of embedding tables."""

import pytest
import torch

from mergekit_ace.matrix.averaging import mean_task_vector
from mergekit_ace.matrix.expert import Expert


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_means_are_taken_in_the_working_dtype(dtype: torch.dtype) -> None:
    """A third of a bfloat16 step is no bfloat16 number, and the sum of a large and a small update keeps the small."""
    base = torch.ones(3, 2, dtype=dtype)
    experts = [
        Expert(name="large", tensor=torch.full((3, 2), 257.0, dtype=dtype), weight=1.0),
        Expert(name="small", tensor=torch.full((3, 2), 1.5, dtype=dtype), weight=2.0),
    ]
    if dtype == torch.bfloat16:
        experts[0] = Expert(name="large", tensor=torch.full((3, 2), 258.0, dtype=dtype), weight=1.0)
    merged = mean_task_vector(base, experts, name="bias")
    assert merged.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    large = float(experts[0].tensor[0, 0]) - 1
    torch.testing.assert_close(merged.double(), torch.full((3, 2), (large + 1) / 3, dtype=torch.float64))


def test_a_transposed_base_is_read_as_it_is() -> None:
    base = torch.arange(6.0).view(2, 3).T
    merged = mean_task_vector(base, [Expert(name="one", tensor=base.contiguous() + 1)], name="table")
    assert merged.is_contiguous()
    assert torch.equal(merged, torch.ones(3, 2))


def test_what_is_not_finite_is_named() -> None:
    base = torch.zeros(4)
    experts = [
        Expert(name="sound", tensor=torch.ones(4)),
        Expert(name="broken", tensor=torch.tensor([0.0, float("nan"), 0, 0])),
    ]
    with pytest.raises(ValueError, match=r"norm\.weight: every weight must be finite; expert broken holds NaN"):
        mean_task_vector(base, experts, name="norm.weight")
