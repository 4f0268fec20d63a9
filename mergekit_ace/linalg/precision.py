"""Which floating-point precision a step works in, and the guard that it really does."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_ace.linalg.blocks import blocks

FLOAT32_EPS = torch.finfo(torch.float32).eps


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of products and solves for inputs of `dtype`: float64 stays float64, all else becomes float32.

    bfloat16 and float16 have 8 and 11 significant bits: a Gram product in them would lose every small eigenvalue.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def require_full_float32(device: torch.device) -> None:
    """Refuse to run float32 products as TF32 or bfloat16.

    A Gram product squares the condition number, so its 24 significant bits are all needed; the reduced modes keep 8
    to 11. The switches are global to the process, hence checked and never set: another thread may rely on them. What
    lowers the precision from outside of torch is found by a product, once a device.

    Args:
        device: whose products are meant. A setting that only other kinds of device read (cuDNN's, on a CPU) is none.

    Raises:
        RuntimeError: the precision is reduced; the message names the cause and how to undo it.
    """
    lowered = _lowered_setting(device)
    if lowered is not None:
        what, remedy = lowered
    elif not _multiplies_in_full(device):
        what, remedy = f"a product on {device} with 11 bits or fewer", _unset(_OUTSIDE_OF_TORCH)
    else:
        return
    raise RuntimeError(
        f"float32 matrix products must run in full precision to merge by covariance; got {what}. {remedy}"
    )


_OF_TORCH = ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",)
_OUTSIDE_OF_TORCH = ("NVIDIA_TF32_OVERRIDE", "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE")
_REDUCED = ("tf32", "bf16")


def _lowered_setting(device: torch.device) -> tuple[str, str] | None:
    """What in torch lowers the precision on a device, and the remedy; None where nothing does."""
    remedy = _unset(_OF_TORCH)
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # Some backend's own setting was changed, which that cannot put into a word.
        backend = "mkldnn" if device.type == "cpu" else "cuda"
        own = getattr(torch.backends, backend).matmul.fp32_precision
        if own not in _REDUCED:
            return None
        return f"torch.backends.{backend}.matmul.fp32_precision = {own!r}", remedy
    return None if precision == "highest" else (f"float32 matmul precision {precision!r}", remedy)


def _unset(variables: Sequence[str]) -> str:
    """The remedy: which of these environment variables to unset, or the call where none of them is set."""
    given = [f"{name}={os.environ[name]}" for name in variables if os.environ.get(name, "0") not in ("", "0")]
    if given:
        unset = " ".join(assignment.partition("=")[0] for assignment in given)
        return f"The environment has {', '.join(given)}: run `unset {unset}` and start the merge again."
    if variables is _OF_TORCH:
        return "Call torch.set_float32_matmul_precision('highest') before the merge."
    return f"Unset what forces it ({', '.join(variables)} are known to), or merge on another device."


# A multiple of the tiles of tensor cores, so that these are used where they may be.
_SIDE = 128


@functools.cache
def _multiplies_in_full(device: torch.device) -> bool:
    """Whether the square of `1 + 2^-12` has its bit `2^-11` in a product on a device: TF32 rounds the factor to 1."""
    factor = torch.full((_SIDE, _SIDE), 1 + 2**-12, dtype=torch.float32, device=device)
    product = (factor @ factor) / _SIDE
    return bool((product > 1 + 2**-12).all())


def squared_norm(matrix: Tensor) -> float:
    """Squared Frobenius norm `||X||_F^2`, accumulated in float64 so that no float32 entry can over- or underflow it."""
    return float(squared_norms([matrix]))


def inner_product(left: Tensor, right: Tensor) -> float:
    """Frobenius inner product `<X, Y>`, accumulated in float64."""
    return float(inner_products([(left, right)]))


def squared_norms(matrices: Sequence[Tensor]) -> Tensor:
    """`squared_norm` of each, `[count]` float64 on their device: what the host reads at once it waits for once."""
    return inner_products([(matrix, matrix) for matrix in matrices])


def inner_products(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """`inner_product` of each pair, as `squared_norms`."""
    return torch.stack([_inner_product(left, right) for left, right in pairs])


def _inner_product(left: Tensor, right: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=left.device)
    for ours, theirs in zip(blocks(left), blocks(right), strict=True):
        values = ours.flatten().double()
        total += torch.dot(values, values if left is right else theirs.flatten().double())
    return total


def all_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinity, at the cost of one number read from a device."""
    return bool(torch.stack([torch.isfinite(block).all() for block in blocks(tensor)]).all())
