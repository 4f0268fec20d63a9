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

Treatment = Literal["ace", "average", "base"]
TaskVectorMerge = Callable[[Sequence[Tensor], Sequence[float] | None, torch.dtype], Tensor]


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
    start = base.to(dtype)
    task_vectors = [expert.to(dtype) - start for expert in experts]
    return start + recipe.scale * merged_task_vector(name, task_vectors, recipe, dtype, merge)


def merged_task_vector(
    name: str,
    task_vectors: Sequence[Tensor],
    recipe: Recipe,
    dtype: torch.dtype = torch.float64,
    merge: TaskVectorMerge | None = None,
) -> Tensor:
    """What the experts' updates of one tensor become, before `lambda`."""
    treatment = recipe.treatment(name, task_vectors[0])
    if treatment == "base":
        return torch.zeros_like(task_vectors[0], dtype=dtype)
    if treatment == "average":
        return weighted_mean(task_vectors, recipe.weights, dtype)
    if task_vectors[0].ndim == 3:
        slices = zip(*task_vectors, strict=True)
        return torch.stack([_matrix(name, list(matrices), recipe, dtype, merge) for matrices in slices])
    return _matrix(name, task_vectors, recipe, dtype, merge)


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
    task_vectors: Sequence[Tensor],
    recipe: Recipe,
    dtype: torch.dtype,
    merge: TaskVectorMerge | None,
) -> Tensor:
    input_first = _matches(name, recipe.input_first)
    oriented = [d.T for d in task_vectors] if input_first else list(task_vectors)
    if merge is None:
        merged = ace(oriented, recipe.options, recipe.weights, dtype)
    else:
        merged = merge(oriented, recipe.weights, dtype)
    return merged.T if input_first else merged


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
