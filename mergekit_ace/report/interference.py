"""How the experts of one layer stand to each other, and what the merge costs each of them.

Always under ACE's second-order proxy, `G_t = C_t^T C_t` of the centered task vector, so that methods can be compared.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_ace.linalg.symmetric import gram
from mergekit_ace.matrix.task_vectors import TaskVectors
from mergekit_ace.report.model import Interference


def losses(task_vectors: TaskVectors, merged: Tensor) -> list[float]:
    """`tr((W - D_t) G_t (W - D_t)^T) / tr(D_t G_t D_t^T)` of each expert; 0 where `G_t` is zero.

    Args:
        task_vectors: of the layer.
        merged: `W`, `[m, n]`, working dtype.
    """
    result = []
    for t in range(len(task_vectors)):
        update = task_vectors.task_vector(t)
        proxy = second_moment_root(update)
        own = _energy(update, proxy)
        result.append(_energy(merged - update, proxy) / own if own > 0 else 0.0)
    return result


def interference(task_vectors: TaskVectors) -> Interference:
    """Overlap of input subspaces and alignment of task vectors, for every pair.

    Holds one `[n, n]` Gram matrix per expert where matrices are tall, else two `[m, n]` task vectors at a time.
    """
    T = len(task_vectors)
    m, n = task_vectors.shape
    overlap = torch.eye(T, dtype=torch.float64, device="cpu")
    alignment = overlap.clone()
    grams: list[Tensor] = []
    own: list[float] = []
    for s in range(T):
        update = task_vectors.task_vector(s)
        root = second_moment_root(update)
        if n <= m:
            grams.append(gram(root))
            own.append(_dot(grams[s], grams[s]))
        else:
            own.append(_square(root @ root.mT))
        for t in range(s):
            other = task_vectors.task_vector(t)
            norms = (task_vectors.energies[s] * task_vectors.energies[t]) ** 0.5
            alignment[s, t] = alignment[t, s] = _dot(update, other) / norms
            shared = _dot(grams[s], grams[t]) if n <= m else _square(root @ second_moment_root(other).mT)
            scale = (own[s] * own[t]) ** 0.5
            overlap[s, t] = overlap[t, s] = shared / scale if scale else 0.0
    return Interference(overlap=_rows(overlap), alignment=_rows(alignment))


def second_moment_root(update: Tensor) -> Tensor:
    """`C`, the centered task vector, whose second moment `C^T C` stands for the expert's inputs (ACE, Eq. 5)."""
    return update - update.mean(dim=0)


def _energy(rows: Tensor, root: Tensor) -> float:
    """`tr(X C^T C X^T)`, by the cheaper side."""
    m, n = root.shape
    if m <= n:
        return _square(rows @ root.mT)
    return _dot(rows @ gram(root), rows)


def _dot(left: Tensor, right: Tensor) -> float:
    return float((left * right).sum(dtype=torch.float64))


def _square(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2


def _rows(matrix: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(value) for value in row) for row in matrix)
