"""WUDI by gradient flow: the descent from the sum of the task vectors, for a given time, in closed form."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from mergekit_ace.linalg.symmetric import add_gram_upper_, gram, mirror_upper_
from mergekit_ace.matrix.task_vectors import TaskVectors

Start = Literal["sum", "average"]


def flow_interference(task_vectors: TaskVectors, *, time: float, start: Start) -> Tensor:
    """The gradient flow of `1/2 sum_t a_t ||(X - D_t) D_t^T||_F^2 / ||D_t||_F^2` from `X_0`, after a time.

        X = X_0 exp(-s C) + N C^-1 (1 - exp(-s C))
          = X_0 + (N - X_0 C) V diag((1 - exp(-s l)) / l) V^T

    with `C = sum_t a_t G_t / ||D_t||_F^2 = V diag(l) V^T`, `N = sum_t a_t D_t G_t / ||D_t||_F^2`, `G_t = D_t^T D_t`.
    Directions with `s l` far above 1 have their minimizer, those far below keep `X_0`. The trace of `C` is `T`
    whatever the size of the updates, so that `s` is a pure number and the result follows their unit. `a_t` is the
    expert's share.

    Where the `T m` rows of all updates are fewer than `n`, the same by the eigenvectors of their products `[T m, T m]`.

    Source: "SWUDI", arXiv:2606.07289, soft filter, `s = 300`. The paper also leaves out the smallest 15 to 35 percent
    of the eigenvalues, a number for each model family; the exponential leaves out what is small.

    Args:
        task_vectors: of one `[m, n]` weight, at least one expert.
        time: `s`, positive.
        start: `X_0`: `sum_t a_t D_t`, as the paper has it, or their mean.

    Returns:
        `[m, n]`, working dtype. Eigenvectors are found in float64.
    """
    rows, columns = task_vectors.buffer_shape
    origin = task_vectors.sum() if start == "sum" else task_vectors.mean()
    if len(task_vectors) * rows < columns:
        return _by_rows(task_vectors, origin, time)
    curvature, descent = task_vectors.zeros(columns, columns), task_vectors.zeros(rows, columns)
    for t, (share, energy) in enumerate(zip(task_vectors.shares, task_vectors.energies, strict=True)):
        update = task_vectors.task_vector(t)
        # N - X_0 C term by term: as one difference it would lose what the two have in common.
        away = (update - origin).mul_(share / energy)
        if rows < columns:
            add_gram_upper_(curvature, update, scale=share / energy)
            descent.addmm_(away @ update.mT, update)
        else:
            moment = gram(update)
            curvature.add_(moment, alpha=share / energy)
            descent.addmm_(away, moment)
    if rows < columns:
        mirror_upper_(curvature)
    return origin.addmm_(descent, _gathered(curvature, time))


def _by_rows(task_vectors: TaskVectors, origin: Tensor, time: float) -> Tensor:
    """With `Y` the rows of all `sqrt(a_t) D_t / ||D_t||_F`: `C = Y^T Y`, and `phi(C) Y^T = Y^T phi(Y Y^T)`."""
    stacked, descent = [], []
    for t, (share, energy) in enumerate(zip(task_vectors.shares, task_vectors.energies, strict=True)):
        update = task_vectors.task_vector(t)
        descent.append((update - origin) @ update.mT * math.sqrt(share / energy))
        stacked.append(update.mul_(math.sqrt(share / energy)))
    rows = torch.cat(stacked)
    return origin.addmm_(torch.cat(descent, dim=1) @ _gathered(gram(rows.mT), time), rows)


def _gathered(curvature: Tensor, time: float) -> Tensor:
    """`integral from 0 to s of exp(-C x) dx = V diag((1 - exp(-s l)) / l) V^T`; `s` where `l` is 0."""
    values, vectors = torch.linalg.eigh(curvature.double())
    # Rounding may leave eigenvalues below zero.
    smallest = torch.finfo(torch.float64).eps / time
    values = values.clamp_min(smallest)
    gathered: Tensor = (vectors * (-torch.expm1(-time * values) / values)) @ vectors.mT
    return gathered.to(curvature.dtype)
