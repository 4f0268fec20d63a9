"""Products of float32 matrices with factors in bfloat16, where the processor multiplies these at twice the speed."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from mergekit_ace.linalg.precision import squared_norm

ROUNDING = 1.66e-3
"""`||bfloat16(X) - X||_F / ||X||_F` of normal numbers: `2^-7 / sqrt(12)` of the power of two below each."""
# Instructions that multiply pairs of bfloat16 numbers into float32 sums.
_INSTRUCTIONS = ("avx512_bf16", "amx_bf16")
# The conversions cost more than what smaller products save.
_SMALLEST_SIDE = 256
_SIDE = 128


def is_faster(device: torch.device, *sides: int) -> bool:
    """Whether `product` is clearly faster than one in float32 for matrices of these sides, and as accurate as it says.

    By what the processor can do and not by a clock, so that a recipe gives the same weights on every run. Only CPUs are
    known: the products of GPUs have not been measured.
    """
    return min(sides) >= _SMALLEST_SIDE and device.type == "cpu" and _multiplies(device)


@functools.cache
def _multiplies(device: torch.device) -> bool:
    """Whether the processor has the instructions, and sums in more digits than the factors have."""
    # torch has it from 2.12 on; before, products stay in float32.
    known: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    if not any(known.get(name, False) for name in _INSTRUCTIONS):
        return False
    # 1 + 128 * 2^-9 is lost term by term in sums of 8 bits.
    left = torch.full((_SIDE, _SIDE), 2.0**-9, dtype=torch.float32, device=device)
    left[:, 0] = 1.0
    return bool((product(left, torch.ones_like(left)) > 1 + 2**-3).all())


def product_within(left: Tensor, right: Tensor, error: float) -> tuple[Tensor | None, float]:
    """`product(left, right)` and the estimate of its error, `||.||_F`; None and 0 where that is above `error`."""
    norms = torch.linalg.vector_norm(left, dim=0) * torch.linalg.vector_norm(right, dim=1)
    of_factors = 2 * float(norms.double().square().sum())
    if ROUNDING * of_factors**0.5 > error:
        return None, 0.0
    found = product(left, right)
    estimate = ROUNDING * (of_factors + squared_norm(found)) ** 0.5
    return (found, estimate) if estimate <= error else (None, 0.0)


def product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` in bfloat16: both factors are rounded to it, and so is the sum, which is taken in float32.

    With independent roundings `||error||_F^2` is about `ROUNDING^2 (2 sum_i ||l_i||^2 ||r_i||^2 + ||left @ right||^2)`,
    with the columns `l_i` of `left` and the rows `r_i` of `right`.

    Args:
        left: `[m, n]`.
        right: `[n, q]`.

    Returns:
        `[m, q]` bfloat16.
    """
    return left.bfloat16() @ right.bfloat16()
