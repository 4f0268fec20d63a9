"""Controlled task vectors: who changed a tensor, and by how much."""

from collections.abc import Mapping, Sequence
from enum import Enum

import torch
from torch import Tensor

# Squared Frobenius norms of the experts' updates, recycled when there are more experts. With the published statistic,
# `EVEN` has gamma = 0.016 and `UNEVEN` gamma = 3.3 for three experts: either side of the threshold 0.3.
EVEN = (4.0, 5.0, 6.0)
UNEVEN = (0.5, 2.0, 30.0)


class Update(Enum):
    """What the experts did to one tensor."""

    EVEN = "all experts, homogeneous"
    UNEVEN = "all experts, heterogeneous"
    PARTLY_EVEN = "all but the first expert, homogeneous"
    PARTLY_UNEVEN = "all but the middle expert, heterogeneous"
    ONE = "the last expert only"
    FROZEN = "no expert"

    def squared_norms(self, experts: int) -> list[float]:
        """`||D_t||_F^2` for each expert; 0 where the expert left the tensor alone."""
        if self is Update.FROZEN:
            return [0.0] * experts
        if self is Update.ONE:
            return [0.0] * (experts - 1) + [EVEN[0]]
        uneven = self in (Update.UNEVEN, Update.PARTLY_UNEVEN)
        norms = [(UNEVEN if uneven else EVEN)[t % 3] for t in range(experts)]
        if self is Update.PARTLY_EVEN:
            norms[0] = 0.0
        if self is Update.PARTLY_UNEVEN:
            norms[experts // 2] = 0.0
        return norms


CYCLE = tuple(Update)


def updates_for(names: Sequence[str]) -> dict[str, Update]:
    """Every kind of update in turn, so that a checkpoint of a dozen tensors holds them all.

    The cycle is shifted by the number of a layer, or each kind of projection would always meet the same update.
    """
    return {name: CYCLE[(index + index // len(CYCLE)) % len(CYCLE)] for index, name in enumerate(names)}


def task_vectors(shape: Sequence[int], update: Update, experts: int, generator: torch.Generator) -> list[Tensor]:
    """Gaussian directions of the update's norms, float32, with a mean row that is not zero."""
    if len(shape) == 3:  # a stack of matrices: each has its own updates
        stacks = [task_vectors(shape[1:], update, experts, generator) for _ in range(shape[0])]
        return [torch.stack(slices) for slices in zip(*stacks, strict=True)]
    result = []
    for squared_norm in update.squared_norms(experts):
        direction = torch.randn(tuple(shape), generator=generator)
        if len(shape) > 1:
            direction += 0.3 * torch.randn(shape[-1], generator=generator)
        result.append(direction * (squared_norm**0.5 / direction.norm()))
    return result


def expert_parameters(
    parameters: Mapping[str, Tensor], updates: Mapping[str, Update], experts: int, seed: int, scale: float = 1.0
) -> list[dict[str, Tensor]]:
    """The parameters of every expert, in the base's own dtype."""
    generator = torch.Generator().manual_seed(seed)
    result: list[dict[str, Tensor]] = [{} for _ in range(experts)]
    for name, parameter in parameters.items():
        deltas = task_vectors(parameter.shape, updates[name], experts, generator)
        for expert, delta in zip(result, deltas, strict=True):
            expert[name] = (parameter.float() + scale * delta).to(parameter.dtype) if delta.any() else parameter
    return result
