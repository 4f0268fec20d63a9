"""Whole tensors and whole checkpoints: what each tensor of a merge must be.

How a tensor is treated is stated by the test (name patterns for tables, stacked experts and the like), never asked of
the package.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor

from tests.reference.ace import AceOptions, ace
from tests.reference.subspace import RELATIVE_RANK

Treatment = Literal["ace", "average", "base"]
TaskVectorMerge = Callable[[Sequence[Tensor], Sequence[float] | None, torch.dtype, Tensor], Tensor]
"""Task vectors, weights, dtype, base."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The parameters of one merge, as a recipe would state them.

    `tables` and `averaged` are name patterns of the tensors that are not merged by ACE although their shape is a
    matrix (or a stack of them); `tables` follow `embeddings`. `input_first` names the matrices stored `[in, out]`.
    """

    options: AceOptions = field(default_factory=AceOptions)
    weights: tuple[float, ...] | None = None
    scale: float = 1.0
    embeddings: Treatment = "average"
    tables: tuple[str, ...] = ()
    averaged: tuple[str, ...] = ()
    input_first: tuple[str, ...] = ()

    def treatment(self, name: str, tensor: Tensor) -> Treatment:
        """Vectors and kernels are averaged, tables follow `embeddings`, matrices and stacks of them are merged.

        So is a matrix of one row, whose centered proxy is zero: ACE would lose its update.
        """
        if _matches(name, self.tables):
            return self.embeddings
        if tensor.ndim not in (2, 3) or _matches(name, self.averaged):
            return "average"
        if tensor.shape[-1 if _matches(name, self.input_first) else -2] == 1:
            return "average"
        return "ace"


PUBLISHED_RECIPE = Recipe()


def merge_tensor(
    name: str,
    base: Tensor,
    experts: Sequence[Tensor],
    recipe: Recipe = PUBLISHED_RECIPE,
    dtype: torch.dtype = torch.float64,
    merge: TaskVectorMerge | None = None,
) -> Tensor:
    """The merged tensor in `dtype`, not rounded back to the checkpoint's own; `merge` replaces ACE for a matrix."""
    treatment = recipe.treatment(name, base)
    start = base.to(dtype)
    if treatment == "base":
        return start
    if treatment == "average":
        task_vectors = [expert.to(dtype) - start for expert in experts]
        return start + recipe.scale * weighted_mean(task_vectors, recipe.weights, dtype)
    if base.ndim == 3:
        slices = zip(base, *experts, strict=True)
        return torch.stack([_matrix(name, first, rest, recipe, dtype, merge) for first, *rest in slices])
    return _matrix(name, base, experts, recipe, dtype, merge)


def weighted_mean(task_vectors: Sequence[Tensor], weights: Sequence[float] | None, dtype: torch.dtype) -> Tensor:
    """`sum_t a_t D_t / sum_t a_t` over all experts, those that did not change the tensor included."""
    a = [1.0] * len(task_vectors) if weights is None else list(weights)
    return sum((a_t * d.to(dtype) for a_t, d in zip(a, task_vectors, strict=True)), torch.zeros(())) / sum(a)


def merge_checkpoint(
    base: Mapping[str, Tensor],
    experts: Sequence[Mapping[str, Tensor]],
    recipe: Recipe = PUBLISHED_RECIPE,
    dtype: torch.dtype = torch.float64,
    merge: TaskVectorMerge | None = None,
) -> dict[str, Tensor]:
    """Every floating tensor of a checkpoint merged, in `dtype`."""
    return {
        name: merge_tensor(name, tensor, [expert[name] for expert in experts], recipe, dtype, merge)
        for name, tensor in base.items()
        if tensor.is_floating_point()
    }


def _matrix(
    name: str,
    base: Tensor,
    experts: Sequence[Tensor],
    recipe: Recipe,
    dtype: torch.dtype,
    merge: TaskVectorMerge | None,
) -> Tensor:
    start = base.to(dtype)
    # A checkpoint that was once stored in another dtype differs from its base by rounding alone where it was not
    # trained: such a difference is no update. Inputs of 16 bits are as exact as float32 where they are differenced.
    precision = torch.float64 if base.dtype == torch.float64 else torch.float32
    noise = torch.finfo(precision).eps * start.norm()
    task_vectors = [expert.to(dtype) - start for expert in experts]
    task_vectors = [d if d.norm() > noise else torch.zeros_like(d) for d in task_vectors]
    turned = _matches(name, recipe.input_first)
    if turned:
        task_vectors = [d.T for d in task_vectors]
    if merge is None:
        merged = ace(task_vectors, recipe.options, recipe.weights, dtype, RELATIVE_RANK[precision])
    else:
        merged = merge(task_vectors, recipe.weights, dtype, start)
    return start + recipe.scale * (merged.T if turned else merged)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
