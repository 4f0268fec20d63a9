"""Which floating-point precision a step works in, and the guard that it really does."""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_ace.linalg.blocks import blocks

FLOAT32_EPS = torch.finfo(torch.float32).eps


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of products and solves for inputs of `dtype`: float64 stays float64, all else becomes float32.

    bfloat16 and float16 have 8 and 11 significant bits: a Gram product in them would lose every small eigenvalue.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def require_full_float32() -> None:
    """Refuse to run float32 products as TF32 or bfloat16.

    A Gram product squares the condition number, so its 24 significant bits are all needed; the reduced modes keep 8
    to 11. The switch is global to the process, hence checked and never set: another thread may rely on it.

    Raises:
        RuntimeError: when `torch.get_float32_matmul_precision()` is not `highest`, or when some backend's own
            `fp32_precision` was lowered, which that cannot put into a word.
    """
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:
        precision = "a lower fp32_precision of one of torch.backends"
    if precision != "highest":
        raise RuntimeError(
            f"float32 matrix products must run in full precision to merge by covariance; got {precision!r}. "
            "Call torch.set_float32_matmul_precision('highest') before the merge."
        )


def squared_norm(matrix: Tensor) -> float:
    """Squared Frobenius norm `||X||_F^2`, accumulated in float64 so that no float32 entry can over- or underflow it."""
    total = torch.zeros((), dtype=torch.float64, device=matrix.device)
    for block in blocks(matrix):
        values = block.flatten().double()
        total += torch.dot(values, values)
    return float(total)


def inner_product(left: Tensor, right: Tensor) -> float:
    """Frobenius inner product `<X, Y>`, accumulated in float64."""
    total = torch.zeros((), dtype=torch.float64, device=left.device)
    for ours, theirs in zip(blocks(left), blocks(right), strict=True):
        total += torch.dot(ours.flatten().double(), theirs.flatten().double())
    return float(total)


def all_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinity, at the cost of one number read from a device."""
    return bool(torch.stack([torch.isfinite(block).all() for block in blocks(tensor)]).all())
