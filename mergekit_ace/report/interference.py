"""How the experts of one matrix stand to each other, and what the merge costs each of them.

Always under `G_t = D_t^T D_t` of the plain task vectors, whatever second moment the method takes, so that methods can
be compared; and where an expert's inputs were measured, under their second moment too. Products only, no
decomposition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mergekit_ace.linalg.precision import inner_product, squared_norm
from mergekit_ace.linalg.symmetric import gram
from mergekit_ace.matrix.task_vectors import TaskVectors
from mergekit_ace.report.against_measured import AgainstMeasured, against_measured
from mergekit_ace.report.model import Interference


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The experts of one matrix, compared."""

    interference: Interference | None
    """None for a single expert."""
    effective_ranks: Sequence[float]
    """Of each expert's task vector."""
    losses: Sequence[float]
    """Of each expert."""
    against_measured: Sequence[AgainstMeasured | None]
    """Of each expert; None where its inputs were not measured."""


def compare(task_vectors: TaskVectors, merged: Tensor) -> Comparison:
    """Overlap and alignment of every pair, effective rank and loss of every expert.

    Of tall matrices one `[n, n]` second moment an expert is held; of wide ones two `[m, n]` task vectors at a time.

    Args:
        task_vectors: at least one expert.
        merged: `W`, `[m, n]`, working dtype.
    """
    T = len(task_vectors)
    m, n = task_vectors.buffer_shape
    tall = n <= m
    # Python's floats: a device need not have float64, and nothing here is large.
    overlap = [[float(s == t) for t in range(T)] for s in range(T)]
    alignment = [[float(s == t) for t in range(T)] for s in range(T)]
    moments: list[Tensor] = []
    squares: list[float] = []
    losses: list[float] = []
    held: list[AgainstMeasured | None] = []
    for s in range(T):
        update = task_vectors.task_vector(s)
        moment = small_gram(update)
        squares.append(squared_norm(moment))
        if tall:
            moments.append(moment)
        for t in range(s):
            other = task_vectors.task_vector(t)
            norms = (task_vectors.energies[s] * task_vectors.energies[t]) ** 0.5
            alignment[s][t] = alignment[t][s] = inner_product(update, other) / norms
            shared = inner_product(moment, moments[t]) if tall else squared_norm(update @ other.mT)
            overlap[s][t] = overlap[t][s] = shared / (squares[s] * squares[t]) ** 0.5
        missed = merged - update
        lost = inner_product(gram(missed), moment) if tall else squared_norm(missed @ update.mT)
        losses.append(max(0.0, lost) / squares[s])
        measured = task_vectors.experts[s].measured
        held.append(measured if measured is None else against_measured(measured, update, missed, squared=squares[s]))
    ranks = [energy**2 / square for energy, square in zip(task_vectors.energies, squares, strict=True)]
    return Comparison(
        interference=Interference(overlap=_rows(overlap), alignment=_rows(alignment)) if T > 1 else None,
        effective_ranks=ranks,
        losses=losses,
        against_measured=held,
    )


def effective_rank(matrix: Tensor) -> float:
    """`(tr G)^2 / tr(G^2)`, `G = X^T X`: participation ratio of the squared singular values; 0 for a zero matrix."""
    moment = squared_norm(small_gram(matrix))
    return squared_norm(matrix) ** 2 / moment if moment > 0 else 0.0


def small_gram(matrix: Tensor) -> Tensor:
    """`X^T X` or `X X^T`, whichever is smaller: their nonzero eigenvalues are the same."""
    return gram(matrix if matrix.shape[1] <= matrix.shape[0] else matrix.mT)


def _rows(matrix: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in matrix)
