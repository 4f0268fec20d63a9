"""Several low-rank updates of one weight in the coordinates that they share.

With orthonormal columns `U` that span all `left_t`, and orthonormal rows `V` that span all `right_t`,

    D_t = left_t right_t = U M_t V,    M_t = (U^T left_t) (right_t V^T)

so whatever depends on the updates by products, norms and singular values alone is the same of the small cores `M_t`.
`U` also spans the column of ones, so that mean rows have their coordinates too.

Source: "Accurate and Efficient Low-Rank Model Merging in Core Space", arXiv:2509.17786.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_ace.linalg.factors import Factors
from mergekit_ace.matrix.coordinates import Coordinates
from mergekit_ace.matrix.core_task_vectors import CoreExpert, CoreTaskVectors
from mergekit_ace.matrix.expert import Participant

# A core is a product of three rounded matrices: singular values of a few units of rounding are none.
_ROUNDING_UNITS = 4.0


@dataclass(frozen=True, kw_only=True)
class CoreSpace:
    """The shared coordinates of updates `[m, n]`, and the updates in them."""

    left: Tensor
    """`U`, `[m, p]`, orthonormal columns; `p` is at most `m`, and at most the ranks' sum plus one."""
    right: Tensor | None
    """`V`, `[q, n]`, orthonormal rows; None: the identity, which is not formed."""
    cores: tuple[Factors, ...]
    """`M_t`, `[p, q]`, of factors; equal updates have equal ones."""

    @property
    def ones_left(self) -> Tensor:
        """`U^T 1_m`, `[p]`; `U` times it is the column of ones."""
        return self.left.sum(dim=0)

    @property
    def ones_right(self) -> Tensor:
        """`V 1_n`, `[q]`: of the column of ones, what lies in the row space."""
        return self.left.new_ones(self.inputs) if self.right is None else self.right.sum(dim=1)

    @property
    def inputs(self) -> int:
        """`n`."""
        return (self.cores[0].right if self.right is None else self.right).shape[1]

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
        Bases by a QR factorization of all factors side by side; the factors of the cores are blocks of its triangles.
    """
    distinct, became = _without_copies(updates)
    left, columns = _left_basis(distinct)
    right, rows = torch.linalg.qr(torch.cat([update.right.mT for update in distinct], dim=1))
    cores = [Factors(left=columns[:, block], right=rows[:, block].mT) for block in _blocks(distinct)]
    return CoreSpace(left=left, right=right.mT, cores=tuple(cores[place] for place in became))


def output_space(updates: Sequence[Factors]) -> CoreSpace:
    """The updates in the coordinates that their outputs share alone, their inputs as they are: `V = I`, `[p, n]` cores.

    For merges by measured second moments of the inputs, which reach beyond the row space of the updates: the merged
    update has the columns of the updates, but rows of its own.

    Args:
        updates: `[m, r_t]` and `[r_t, n]`.
    """
    distinct, became = _without_copies(updates)
    left, columns = _left_basis(distinct)
    cores = [
        Factors(left=columns[:, block], right=update.right)
        for block, update in zip(_blocks(distinct), distinct, strict=True)
    ]
    return CoreSpace(left=left, right=None, cores=tuple(cores[place] for place in became))


def task_vectors_of(
    space: CoreSpace,
    experts: Sequence[Participant],
    *,
    name: str,
    base_norm: float | None = None,
    depth: int | None = None,
) -> CoreTaskVectors:
    """The cores as task vectors, for every method to run on.

    Args:
        space: that the cores are of.
        experts: one for each core.
        name: of the tensor, for messages.
        base_norm: `||W_0||_F` of the matrix that was updated; None where it is not known.
        depth: as in `TaskVectors`.
    """
    return CoreTaskVectors(
        [
            CoreExpert(name=expert.name, weight=expert.weight, measured=expert.measured, core=core)
            for expert, core in zip(experts, space.cores, strict=True)
        ],
        coordinates=Coordinates(
            shape=(space.left.shape[0], space.inputs), ones_left=space.ones_left, ones_right=space.ones_right
        ),
        name=name,
        base_norm=base_norm,
        depth=depth,
    )


def _without_copies(updates: Sequence[Factors]) -> tuple[list[Factors], list[int]]:
    """Every update once, and which of them each became. A factorization gives equal columns unequal rounding."""
    distinct: list[Factors] = []
    became: list[int] = []
    for update in updates:
        place = next((p for p, other in enumerate(distinct) if update.is_copy_of(other)), len(distinct))
        if place == len(distinct):
            distinct.append(update)
        became.append(place)
    return distinct, became


def _left_basis(updates: Sequence[Factors]) -> tuple[Tensor, Tensor]:
    """`U`, and all left factors and the column of ones in its coordinates."""
    ones = updates[0].left.new_ones((updates[0].left.shape[0], 1))
    left, columns = torch.linalg.qr(torch.cat([*(update.left for update in updates), ones], dim=1))
    return left, columns


def _blocks(updates: Sequence[Factors]) -> Iterator[slice]:
    """The columns of each, side by side."""
    start = 0
    for update in updates:
        yield slice(start, start + update.rank)
        start += update.rank
