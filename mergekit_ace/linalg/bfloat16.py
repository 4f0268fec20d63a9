"""Products of float32 matrices with factors in bfloat16, where the processor multiplies these at twice the speed."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_ace.linalg.blocks import panels

ROUNDING = 1.66e-3
"""`||bfloat16(X) - X||_F / ||X||_F` of normal numbers: `2^-7 / sqrt(12)` of the power of two below each."""
# Instructions that multiply pairs of bfloat16 numbers into float32 sums.
_INSTRUCTIONS = ("avx512_bf16", "amx_bf16")
# The conversions cost more than what smaller products save.
_SMALLEST_SIDE = 256
_SIDE = 128
# Rows that are enough for an estimate.
_ENOUGH = 2048


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


@dataclass(frozen=True, kw_only=True)
class FactorSizes:
    """What the error of a product needs of a factor, for every index that the sum runs over: `[n]` float64."""

    squares: Tensor
    """`||x_i||^2` of its columns, where it is on the left, or rows."""
    lost: Tensor
    """`||bfloat16(x_i) - x_i||^2`: nothing of task vectors of bfloat16 weights that are small beside the weights."""

    @staticmethod
    def of_columns(pieces: Iterable[Tensor]) -> FactorSizes:
        """Of a factor on the left, given as pieces of its rows."""
        found = [_sizes(panel, dim=0) for panel in pieces]
        return FactorSizes(
            squares=torch.stack([squares for squares, _ in found]).sum(dim=0),
            lost=torch.stack([lost for _, lost in found]).sum(dim=0),
        )

    @staticmethod
    def of_rows(matrix: Tensor) -> FactorSizes:
        """Of a factor on the right."""
        found = [_sizes(matrix[rows], dim=1) for rows in panels(matrix)]
        return FactorSizes(
            squares=torch.cat([squares for squares, _ in found]), lost=torch.cat([lost for _, lost in found])
        )

    def times(self, factor: float) -> FactorSizes:
        """Of so many times the rows."""
        return FactorSizes(squares=self.squares * factor, lost=self.lost * factor)

    def error_with(self, right: FactorSizes) -> float:
        """`||.||_F^2` of the error that rounding both factors adds to their product, if the roundings are random."""
        return float(self.lost @ right.squares + self.squares @ right.lost)


def _sizes(matrix: Tensor, *, dim: int) -> tuple[Tensor, Tensor]:
    # Several times faster than `vector_norm` of rows or columns.
    return matrix.square().sum(dim=dim).double(), (matrix - matrix.bfloat16()).square_().sum(dim=dim).double()


def row_step(height: int) -> int:
    """One row of so many is enough for the sizes of a factor on the left that has `height` of them."""
    return max(1, height // _ENOUGH)


def product_within(left: Tensor, right: Tensor, error: float) -> tuple[Tensor | None, float]:
    """`product(left, right)` and the estimate of its error, `||.||_F`; None and 0 where that is above `error`.

    The estimate looks at some of the rows of `left` and of the product.
    """
    every = row_step(len(left))
    sample = left[::every]
    columns = FactorSizes.of_columns(sample[rows] for rows in panels(sample))
    of_factors = columns.times(len(left) / len(sample)).error_with(FactorSizes.of_rows(right))
    if of_factors > error**2:
        return None, 0.0
    found = product(left, right)
    of_product = float(found[::every].to(left.dtype).square().sum()) * len(left) / len(sample)
    estimate = math.sqrt(of_factors + ROUNDING**2 * of_product)
    return (found, estimate) if estimate <= error else (None, 0.0)


def product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` in bfloat16: both factors are rounded to it, and so is the sum, which is taken in float32.

    With independent roundings `||error||_F^2` is about `sum_i (||dl_i||^2 ||r_i||^2 + ||l_i||^2 ||dr_i||^2) +
    ROUNDING^2 ||left @ right||^2`, with the columns `l_i` of `left`, the rows `r_i` of `right` and what rounding
    changes of each, of normal numbers `ROUNDING` of its norm.

    Args:
        left: `[m, n]`.
        right: `[n, q]`.

    Returns:
        `[m, q]` bfloat16.
    """
    return left.bfloat16() @ right.bfloat16()
