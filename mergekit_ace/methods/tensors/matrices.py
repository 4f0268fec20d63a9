"""The `[out, in]` matrices that a stored tensor is made of: a weight as it is or transposed, or a stack of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mergekit.merge_methods.base import TensorGroup
from torch import Tensor

from mergekit_ace.factors.core_space import CoreSpace, core_space, output_space, task_vectors_of
from mergekit_ace.linalg.factors import Factors
from mergekit_ace.linalg.precision import squared_norm
from mergekit_ace.matrix.expert import Expert
from mergekit_ace.matrix.stored_task_vectors import StoredTaskVectors
from mergekit_ace.matrix.task_vectors import TaskVectors


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """One matrix of every model, inputs last; views of what is stored.

    Attributes:
        name: how messages call it.
        place: its index in the tensor; `()` where it is all of it.
        base: `[out, in]`.
        experts: of the same shape.
        factors: of each expert's update, where all are known; empty otherwise.
        depth: as in `TaskVectors`.
    """

    name: str
    place: tuple[int, ...]
    base: Tensor
    experts: tuple[Expert, ...]
    factors: tuple[Factors, ...] = ()
    depth: int | None = None

    def cores(self) -> CoreSpace | None:
        """The updates in core space, where their factors are known; by measured moments in that of the outputs alone.

        There the merge has no more directions than the factors: in a full matrix the rounding of the solve has all of
        them, and spectral refinement would lift it.
        """
        if not self.factors:
            return None
        here = self.base.device
        moved = [Factors(left=each.left.to(here), right=each.right.to(here)) for each in self.factors]
        return output_space(moved) if any(expert.measured for expert in self.experts) else core_space(moved)

    def task_vectors(self, space: CoreSpace | None) -> TaskVectors:
        """The task vectors, or their cores where these are known."""
        if space is None:
            return StoredTaskVectors(self.base, self.experts, name=self.name, depth=self.depth)
        base_norm = squared_norm(self.base) ** 0.5
        return task_vectors_of(space, self.experts, name=self.name, base_norm=base_norm, depth=self.depth)


def weighted_experts(group: TensorGroup, parameters: Mapping[str, Any]) -> tuple[Expert, ...]:
    """A group's tensors but the base, with their weights in the recipe."""
    weights = parameters["weight"]
    return tuple(Expert(name=str(entry.id), tensor=entry.tensor, weight=weights[entry.id]) for entry in group.non_base)


def matrices(
    name: str,
    base: Tensor,
    experts: Sequence[Expert],
    parameters: Mapping[str, Any],
    factors: Sequence[Factors] = (),
    depth: int | None = None,
) -> Iterator[Matrix]:
    """Every matrix of a tensor.

    Args:
        name: of the tensor; slices are called `name[e]`.
        base: of two or three dimensions.
        experts: of its shape.
        parameters: with `input_axis`.
        factors: of each expert's update, as stored, where all are known; of two dimensions only.
        depth: as in `TaskVectors`.
    """
    if parameters["input_axis"] == "first":
        factors = [each.transposed for each in factors]
    for place in [()] if base.ndim == 2 else [(index,) for index in range(base.shape[0])]:
        yield Matrix(
            name="".join([name, *(f"[{index}]" for index in place)]),
            place=place,
            base=inputs_last(base[place], parameters),
            experts=tuple(replace(expert, tensor=inputs_last(expert.tensor[place], parameters)) for expert in experts),
            factors=tuple(factors),
            depth=depth,
        )


def inputs_last(matrix: Tensor, parameters: Mapping[str, Any]) -> Tensor:
    """A matrix as stored, as `[out, in]`; or back again: the transposition is its own inverse."""
    return matrix.mT if parameters["input_axis"] == "first" else matrix
