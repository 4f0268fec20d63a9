"""Tensors that are not matrices: the weighted mean of the task vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_ace.linalg.blocks import blocks
from mergekit_ace.linalg.precision import working_dtype
from mergekit_ace.matrix.expert import Expert, difference, require_finite_update, voting_experts


def mean_task_vector(base: Tensor, experts: Sequence[Expert], *, name: str) -> Tensor:
    """`sum_t w_t D_t / sum_t w_t`, any shape, working dtype: how tensors that are not matrices are merged.

    Raises:
        ValueError: as `TaskVectors`.
    """
    voting = voting_experts(experts, name=name)
    dtype = working_dtype(base.dtype)
    total = torch.zeros_like(base, dtype=dtype, memory_format=torch.contiguous_format)
    weights = math.fsum(expert.weight for expert in voting)
    for expert in voting:
        squares = base.new_zeros((), dtype=torch.float64)
        for ours, theirs, sums in zip(blocks(base), blocks(expert.tensor), blocks(total), strict=True):
            update = difference(theirs, ours, dtype)
            squares += update.double().square().sum()
            sums.add_(update, alpha=expert.weight / weights)
        require_finite_update(float(squares), base, expert, name=name)
    return total
