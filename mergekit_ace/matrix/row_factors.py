"""The experts' (centered) task vectors as few rows, where few rows are all they have."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_ace.linalg.low_rank import orthonormal_factors
from mergekit_ace.matrix.task_vectors import TaskVectors

# Adapters have ranks of 4 to 64; beyond this the sketch costs more than it can save.
_LARGEST_RANK = 96
# Below this the dense route is quicker than finding out that there is another one.
_SMALLEST_SIDE = 256
# In units of the rounding of a difference of two weights.
_ROUNDING_UNITS = 4.0


@dataclass(frozen=True, kw_only=True)
class ExpertRows:
    """`X_t = U_t Y_t`, with `Y_t` a block of the stacked rows.

    Attributes:
        block: where `Y_t` is in `RowFactors.rows`.
        basis: `U_t`, `[m, r_t]`, orthonormal columns; None where `U_t = I` and the rows are those of `X_t` itself.
        mean_row: `[n]`, what centering took from the rows of `D_t`; None where it was not asked for.
    """

    block: slice
    basis: Tensor | None
    mean_row: Tensor | None


@dataclass(frozen=True, kw_only=True)
class RowFactors:
    """All experts' rows, `[q, n]` with `q < n`, `Y_1 .. Y_T` one below the other."""

    rows: Tensor
    experts: tuple[ExpertRows, ...]


def row_factors(task_vectors: TaskVectors, *, center: bool, low_rank: float | None = None) -> RowFactors | None:
    """The task vectors by fewer than `n` rows in all, or None where they need `n` or more.

    Either because a task vector has few rows (wide layers), or because its numerical rank is low (adapters merged in
    float32: rank 16 of 4096). The rank counts down to the rounding of a difference of two weights in the working dtype,
    so that no digit is lost that the difference has; adapters rounded to bfloat16 are of full rank by that rounding,
    and stay so here.

    Args:
        task_vectors: of a matrix.
        center: factor the centered task vectors.
        low_rank: how far the updates are of low rank; None where that is not known. With 0 it is not looked for, so
            that few rows alone count.
    """
    if task_vectors.coordinates is not None or task_vectors.base_norm is None:  # cores have no rows to spare
        return None
    m, n = task_vectors.shape
    most = min(_LARGEST_RANK, n // (2 * len(task_vectors)))
    worthwhile = low_rank != 0 and min(m, n) >= _SMALLEST_SIDE
    if not worthwhile and not center:
        return _all_rows(task_vectors)
    eps = torch.finfo(task_vectors.dtype).eps
    blocks: list[Tensor] = []
    experts: list[ExpertRows] = []
    height = 0
    for t, energy in enumerate(task_vectors.energies):
        rows, mean_row = _centered(task_vectors, t, center=center)
        factors = None
        if worthwhile:
            tolerance = _ROUNDING_UNITS * eps * (task_vectors.base_norm + energy**0.5)
            factors = orthonormal_factors(rows, most=most, tolerance=tolerance, likely=low_rank is not None)
        if factors is not None:
            basis, rows = factors
        elif height + m >= n:
            return None
        else:
            basis = None
            # The search for factors overwrote the rows.
            rows = _centered(task_vectors, t, center=center)[0] if worthwhile else rows
        blocks.append(rows)
        experts.append(ExpertRows(block=slice(height, height + len(rows)), basis=basis, mean_row=mean_row))
        height += len(rows)
    return RowFactors(rows=torch.cat(blocks), experts=tuple(experts)) if height < n else None


def _all_rows(task_vectors: TaskVectors) -> RowFactors | None:
    """All rows of all task vectors, written where they stay."""
    m, n = task_vectors.shape
    height = m * len(task_vectors)
    if height >= n:
        return None
    rows = torch.empty((height, n), dtype=task_vectors.dtype, device=task_vectors.device)
    experts = []
    for t in range(len(task_vectors)):
        block = slice(t * m, (t + 1) * m)
        task_vectors.task_vector(t, out=rows[block])
        experts.append(ExpertRows(block=block, basis=None, mean_row=None))
    return RowFactors(rows=rows, experts=tuple(experts))


def _centered(task_vectors: TaskVectors, t: int, *, center: bool) -> tuple[Tensor, Tensor | None]:
    rows = task_vectors.task_vector(t)
    if not center:
        return rows, None
    mean_row = rows.mean(dim=0)
    return rows.sub_(mean_row), mean_row
