"""WUDI as published: a few steps of Adam away from the sum of the task vectors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mergekit_ace.linalg.symmetric import add_gram_upper_, gram, mirror_upper_
from mergekit_ace.matrix.task_vectors import TaskVectors


def descend_interference(task_vectors: TaskVectors, *, steps: int, learning_rate: float) -> Tensor:
    """Adam on `sum_t a_t ||(X - D_t) D_t^T||_F^2 / ||D_t||_F^2`, from `X = sum_t a_t D_t`, stopped after `steps`.

    The gradient is `X M - N` with `M = 2 sum_t a_t H_t`, `N = 2 sum_t a_t D_t H_t`, `H_t = D_t^T D_t / ||D_t||_F^2`:
    two matrices that no step changes, so a step costs one `[m, n] x [n, n]` product whatever the number of experts.

    How far the result is from the minimizer depends on the size of the updates: Adam moves an entry by at most about
    `learning_rate` a step. `a_t` is the expert's share.

    Source: Cheng et al., "Whoever Started the Interference Should End It: Guiding Data-Free Model Merging via Task
    Vectors" (WUDI-Merging), ICML 2025, arXiv:2503.08099: 300 steps, learning rate 1e-5.

    Args:
        task_vectors: of one `[m, n]` weight, at least one expert.
        steps: at least 0.
        learning_rate: Adam's, positive, in units of the weights; its other settings are Adam's usual ones.

    Returns:
        `[m, n]`, working dtype.
    """
    m, n = task_vectors.shape
    curvature, target = task_vectors.zeros(n, n), task_vectors.zeros(m, n)
    merged = task_vectors.zeros(m, n)
    for t, (share, energy) in enumerate(zip(task_vectors.shares, task_vectors.energies, strict=True)):
        rows = task_vectors.task_vector(t)
        # The learning rate is in units of the weights, so the descent is too.
        merged.add_(rows, alpha=share * task_vectors.unit)
        norm = math.sqrt(energy) * task_vectors.unit
        rows.div_(math.sqrt(energy))
        if m < n:
            add_gram_upper_(curvature, rows, scale=2 * share)
            target.addmm_(gram(rows.mT), rows, alpha=2 * share * norm)
        else:
            moment = gram(rows)
            curvature.add_(moment, alpha=2 * share)
            target.addmm_(rows, moment, alpha=2 * share * norm)
    if m < n:
        mirror_upper_(curvature)
    optimizer = torch.optim.Adam([merged], lr=learning_rate)
    for _ in range(steps):
        merged.grad = torch.addmm(target, merged, curvature, beta=-1)
        optimizer.step()
    merged.grad = None
    return merged.div_(task_vectors.unit)
