"""Spectral refinement: lift the dominant directions of the merged task vector to their common level."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from mergekit_ace.linalg.subspace import dominant_subspace


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """What was added to the preliminary merge: `level * U_k V_k^T`."""

    directions: int
    level: float
    norm: float
    """`||.||_F` of the update."""
    update: Tensor
    """`[m, n]`."""

    def times_(self, factor: float) -> Refinement:
        """The refinement scaled by `factor`; its update is scaled in place."""
        return replace(self, level=factor * self.level, norm=factor * self.norm, update=self.update.mul_(factor))


def spectral_refinement(
    structure: Tensor, k: int, *, scale: float = 1.0, column_basis: Tensor | None = None
) -> Refinement:
    """`scale * mean(s_1..s_k) U_k V_k^T` of a matrix `F = U diag(s) V^T`.

    Source: ACE, arXiv:2603.02945, Eqs. 17-19, with `F = R + W0` and a scale of 1.

    Args:
        structure: `F`, `[m, n]`, float32 or float64.
        k: how many directions, `1 <= k <= min(m, n)`.
        scale: of the update.
        column_basis: `Q`, `[m, p]`, orthonormal, with `F = Q Q^T F` where that is known: the singular vectors are then
            found in `p` dimensions, and the directions beyond them have singular value zero.
    """
    if column_basis is not None:
        structure = column_basis.mT @ structure
    top = dominant_subspace(structure, min(k, min(structure.shape)))
    level = scale * float(top.singular_values.sum()) / k
    update = top.partial_isometry if column_basis is None else column_basis @ top.partial_isometry
    # A partial isometry has as many unit singular values as it has directions.
    norm = level * float((top.singular_values > 0).sum()) ** 0.5
    return Refinement(directions=k, level=level, norm=norm, update=update.mul_(level))
