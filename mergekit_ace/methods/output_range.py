"""Whether what was merged fits into the dtype that it is stored in."""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_ace.linalg.precision import all_finite
from mergekit_ace.printable import printable
from mergekit_ace.tensor_treatment import is_buffer


def require_in_range(name: str, stored: Tensor, merged: torch.dtype) -> None:
    """Refuse a rounding that made an infinity of a merged weight, as `out_dtype: float16` does above 65504.

    Args:
        name: of the tensor.
        stored: what finite weights became in the dtype of the output.
        merged: the dtype before.

    Raises:
        ValueError: naming the tensor and the remedy.
    """
    if not (stored.is_floating_point() and merged.is_floating_point) or is_buffer(name):
        return
    largest = torch.finfo(stored.dtype).max
    if largest < torch.finfo(merged).max and not all_finite(stored):
        raise ValueError(
            f"{printable(name)}: every stored weight must be finite; the merge exceeds the {largest:g} at which "
            f"{str(stored.dtype).removeprefix('torch.')} ends. Set out_dtype: bfloat16 or float32."
        )
