"""Spectral refinement: lift the dominant directions of the merged task vector to their common level."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from mergekit_ace.linalg.subspace import SingularTriples, dominant_subspace, isometry_error


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """What was added to the preliminary merge: `level * U_k V_k^T`."""

    directions: int
    level: float
    norm: float
    """`||.||_F` of the update."""
    update: Tensor
    """`[m, n]`."""
    estimated_error: float | None
    """Estimated `||.||_F` of the update's error, where the eigendecomposition was one in float32; None: in float64."""
    products: str | None
    """Dtype of the factors of products that have fewer digits than the working dtype; None: none has."""
    triples: SingularTriples | None
    """Of `F`, or of `Q^T F` where a column basis was given; None once nothing needs them."""

    @property
    def precision(self) -> str:
        """Of the eigendecomposition: float32 or float64."""
        return "float64" if self.estimated_error is None else "float32"

    def follows(self, error: float, shape: tuple[int, int]) -> float:
        """`||.||_F` of the update's error that follows from one of `F`, `[m, n]`; infinite where it is not known."""
        if self.triples is None or len(self.triples.on_host) < self.directions:
            return math.inf
        return self.level * float(isometry_error(self.triples.spectrum, self.directions, shape, error))

    def times_(self, factor: float) -> Refinement:
        """The refinement scaled by `factor`; its update is scaled in place."""
        return replace(self, level=factor * self.level, norm=factor * self.norm, update=self.update.mul_(factor))


def spectral_refinement(
    structure: Tensor, k: int, *, scale: float = 1.0, column_basis: Tensor | None = None, error: float = 0.0
) -> Refinement:
    """`scale * mean(s_1..s_k) U_k V_k^T` of a matrix `F = U diag(s) V^T`.

    Source: ACE, arXiv:2603.02945, Eqs. 17-19, with `F = R + W0` and a scale of 1.

    Args:
        structure: `F`, `[m, n]`, float32 or float64.
        k: how many directions, `1 <= k <= min(m, n)`.
        scale: of the update.
        column_basis: `Q`, `[m, p]`, orthonormal, with `F = Q Q^T F` where that is known: the singular vectors are then
            found in `p` dimensions, and the directions beyond them have singular value zero.
        error: `||.||_F` that the update may be wrong by; 0: float64 throughout.
    """
    if column_basis is not None:
        structure = column_basis.mT @ structure
    top = dominant_subspace(structure, min(k, min(structure.shape)), error=error / scale if scale > 0 else 0.0)
    level = scale * float(top.singular_values.sum()) / k
    update = top.partial_isometry if column_basis is None else column_basis @ top.partial_isometry
    # A partial isometry has as many unit singular values as it has directions.
    norm = level * float((top.singular_values > 0).sum()) ** 0.5
    return Refinement(
        directions=k,
        level=level,
        norm=norm,
        update=update.mul_(level),
        estimated_error=None if top.estimated_error is None else scale * top.estimated_error,
        products=top.products,
        triples=top.triples,
    )
