"""What a matrix's merge takes, by its shape alone: the bounds of its memory, the count of its arithmetic."""

from __future__ import annotations

import torch

from mergekit_ace.linalg.blocks import LARGEST_BLOCK, row_slices
from mergekit_ace.linalg.precision import working_dtype

# Seconds of a triangular solve from both sides, and of a product in bfloat16 with its conversions and the estimate of
# its error, over those of a product in float32 of the same sides. Measured on a processor with AVX512-BF16.
_SOLVE, _IN_BFLOAT16 = 1.3, 0.6


def by_stacked_rows(m: int, n: int, experts: int) -> bool:
    """Whether full fine-tunes of this shape have fewer rows together than the matrix has inputs."""
    return experts * m < n


def by_matrix_weights(m: int, n: int, experts: int, *, halved: bool = False) -> bool:
    """Whether the system is solved for the weights of `T` experts, and not for the numerator.

    Beyond the second moments, `T - 1` solves for `n` rows and products against as many products and one solve for `m`
    rows. `T` second moments are kept, which fits into what the refinement takes later.

    Args:
        m: rows.
        n: columns.
        experts: `T`.
        halved: the products have factors in bfloat16.
    """
    if m < n or experts > 7 + 3 * m // n:
        return False
    product = _IN_BFLOAT16 * m if halved else m
    return (experts - 1) * (_SOLVE * n + product) <= (experts - 1) * m + _SOLVE * m


def working_numbers(m: int, n: int, experts: int, *, measured: bool = False) -> int:
    """The most working-dtype numbers that `merge_by_covariance` holds at once beyond its inputs, for full fine-tunes.

        max(3 n^2 + 6 m n, 7 m n + 10 min(m, n)^2)             solve; refinement and bounds
        max(2 q^2 + q n + 2 m q + 3 m n, the same refinement)  where the q = T m rows are fewer than n
        max(4 n^2 + 4 m n, the same refinement)                with measured second moments

    Of the seven, four are float64 copies of two blocks, which are whole tensors where these are small. The number of
    experts only enters where few of them need less than the bound for many. Low-rank updates need less.
    """
    q = experts * m
    dense = 3 * n * n + 6 * m * n
    stacked_rows = 2 * q * q + q * n + 2 * m * q + 3 * m * n
    solve = stacked_rows if by_stacked_rows(m, n, experts) else dense
    if measured:
        solve = 4 * n * n + 4 * m * n
    return max(solve, 7 * m * n + 10 * min(m, n) ** 2)


def unrefined_numbers(m: int, n: int, experts: int) -> int:
    """The same for a tall matrix, of few experts, that is solved and no more, as an output head is.

    The merge itself; `T + 4` of `[n, n]`; three pieces of rows (`row_slices`).
    """
    return m * n + (experts + 4) * n * n + 3 * int(row_slices(m, n)[0].stop) * n


def multiply_adds(m: int, n: int, experts: int, *, measured: int = 0) -> float:
    """Working-dtype multiply-adds of products, factors and triangular solves, for full fine-tunes.

    Symmetric products at half of their full count. The eigendecomposition of the refinement is not in it. `measured` is
    the number of inputs that each second moment is the mean of, 0 for estimates.
    """
    small, large = min(m, n), max(m, n)
    refinement = small * small * large
    if measured:
        each = n * n * (m + min(measured, n)) / 2 + m * n * n
        return experts * each + n**3 / 6 + m * n * n + refinement
    if by_stacked_rows(m, n, experts):
        q = experts * m
        return q * q * n / 2 + experts * m**3 + q**3 / 6 + m * q * q + 2 * m * q * n + refinement
    if by_matrix_weights(m, n, experts):
        return experts * n * n * m / 2 + n**3 / 6 + (experts - 1) * (n**3 + n * n * m) + refinement
    if m >= n:
        return experts * (n * n * m / 2 + m * n * n) + n**3 / 6 + refinement
    each = m * m * n / 2 + m * n * m + n * n * m / 2
    return experts * each + n**3 / 6 + m * n * n + refinement


def averaging_bytes(elements: int, dtype: torch.dtype) -> int:
    """The most bytes that an average (embedding tables, vectors, kernels) holds at once beyond its inputs.

    The mean task vector in the working dtype and the result in `dtype`, one tensor where these are the same; and of one
    block at a time a difference and two float64 copies.
    """
    working = working_dtype(dtype)
    result = 0 if dtype == working else dtype.itemsize
    return (working.itemsize + result) * elements + (working.itemsize + 16) * min(elements, LARGEST_BLOCK)
