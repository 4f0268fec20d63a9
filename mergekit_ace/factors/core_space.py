"""Several low-rank updates of one weight in the coordinates that they share.

With orthonormal columns `U` that span all `left_t`, and orthonormal rows `V` that span all `right_t`,

    D_t = left_t right_t = U M_t V,    M_t = (U^T left_t) (right_t V^T)

so whatever depends on the updates by products, norms and singular values alone is the same of the small cores `M_t`.
`U` also spans the column of ones, so that mean rows have their coordinates too.

Source: "Accurate and Efficient Low-Rank Model Merging in Core Space", arXiv:2509.17786.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_ace.factors.model import Factors
from mergekit_ace.matrix.coordinates import Coordinates
from mergekit_ace.matrix.expert import Expert
from mergekit_ace.matrix.task_vectors import TaskVectors

# A core is a product of three rounded matrices: singular values of a few units of rounding are none.
_ROUNDING_UNITS = 4.0


@dataclass(frozen=True, kw_only=True)
class CoreSpace:
    """The shared coordinates of updates `[m, n]`, and the updates in them."""

    left: Tensor
    """`U`, `[m, p]`, orthonormal columns; `p` is at most `m`, and at most the ranks' sum plus one."""
    right: Tensor | None
    """`V`, `[q, n]`, orthonormal rows; None: the identity, which is not formed."""
    cores: tuple[Tensor, ...]
    """`M_t`, `[p, q]`."""

    @property
    def ones_left(self) -> Tensor:
        """`U^T 1_m`, `[p]`; `U` times it is the column of ones."""
        return self.left.sum(dim=0)

    @property
    def ones_right(self) -> Tensor:
        """`V 1_n`, `[q]`: of the column of ones, what lies in the row space."""
        return self.cores[0].new_ones(self.inputs) if self.right is None else self.right.sum(dim=1)

    @property
    def inputs(self) -> int:
        """`n`."""
        return (self.cores[0] if self.right is None else self.right).shape[1]

    def matrix(self, core: Tensor) -> Tensor:
        """`U core V`, `[m, n]`."""
        return self._rows(self.left @ core)

    def _rows(self, coordinates: Tensor) -> Tensor:
        return coordinates if self.right is None else coordinates @ self.right

    def factors(self, core: Tensor, rank: int | None = None) -> Factors:
        """`U core V` as factors of equal norms: of its numerical rank, or of `rank` if that is less.

        The numerical rank counts singular values that are no rounding of the largest.

        Args:
            core: `[p, q]`.
            rank: at least 1.
        """
        left, singular_values, right = torch.linalg.svd(core.double(), full_matrices=False)
        least = _ROUNDING_UNITS * torch.finfo(core.dtype).eps * singular_values[:1]
        kept = max(1, int((singular_values > least).sum()))
        kept = kept if rank is None else min(kept, rank)
        root = singular_values[:kept].sqrt()
        # Both products in the working dtype: the factors are orthonormal, so that nothing amplifies their rounding.
        return Factors(
            left=self.left @ (left[:, :kept] * root).to(core.dtype),
            right=self._rows((root[:, None] * right[:kept]).to(core.dtype)),
        )


def core_space(updates: Sequence[Factors]) -> CoreSpace:
    """The core space of one or more updates of one weight.

    Args:
        updates: `[m, r_t]` and `[r_t, n]`.

    Returns:
        Bases by a QR factorization of all factors side by side, cores by its triangles.
    """
    ones = updates[0].left.new_ones((updates[0].left.shape[0], 1))
    left, columns = torch.linalg.qr(torch.cat([*(update.left for update in updates), ones], dim=1))
    right, rows = torch.linalg.qr(torch.cat([update.right.mT for update in updates], dim=1))
    cores, start = [], 0
    for update in updates:
        block = slice(start, start + update.rank)
        cores.append(columns[:, block] @ rows[:, block].mT)
        start += update.rank
    return CoreSpace(left=left, right=right.mT, cores=tuple(cores))


def output_space(updates: Sequence[Factors]) -> CoreSpace:
    """The updates in the coordinates that their outputs share alone, their inputs as they are: `V = I`, `[p, n]` cores.

    For merges by measured second moments of the inputs, which reach beyond the row space of the updates: the merged
    update has the columns of the updates, but rows of its own.

    Args:
        updates: `[m, r_t]` and `[r_t, n]`.
    """
    first = updates[0]
    ones = first.left.new_ones((first.left.shape[0], 1))
    left, columns = torch.linalg.qr(torch.cat([*(update.left for update in updates), ones], dim=1))
    cores, start = [], 0
    for update in updates:
        cores.append(columns[:, start : start + update.rank] @ update.right)
        start += update.rank
    return CoreSpace(left=left, right=None, cores=tuple(cores))


def task_vectors_of(
    space: CoreSpace,
    experts: Sequence[Expert],
    *,
    name: str,
    base_norm: float | None = None,
    depth: int | None = None,
) -> TaskVectors:
    """The cores as task vectors of a base of zeros, for every method to run on.

    Args:
        space: that the cores are of.
        experts: with the cores as their tensors.
        name: of the tensor, for messages.
        base_norm: `||W_0||_F` of the matrix that was updated; None where it is not known.
        depth: as in `TaskVectors`.
    """
    coordinates = Coordinates(
        shape=(space.left.shape[0], space.inputs), ones_left=space.ones_left, ones_right=space.ones_right
    )
    found = TaskVectors(torch.zeros_like(space.cores[0]), experts, name=name, coordinates=coordinates, depth=depth)
    found.base_norm = base_norm
    return found
