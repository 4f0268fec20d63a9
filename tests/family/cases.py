"""Every method, under its defaults and under each choice that its own parameters offer."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args, get_origin

import torch
from mergekit.merge_methods.api import merge_tensors
from torch import Tensor

import mergekit_ace
from mergekit_ace.methods.layerwise import LayerwiseMethod
from tests.family.documented import documented_method

NAME = "layers.0.weight"
BASE, ALPHA, BETA, GAMMA = "the-base", "alpha", "beta", "gamma"


@dataclass(frozen=True)
class Case:
    """A method and what a recipe says to it beyond the models."""

    method: LayerwiseMethod
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.method.name, *(f"{name}={value}" for name, value in self.parameters.items())])

    def merge(
        self, base: Tensor, experts: Sequence[Tensor], *, name: str = NAME, weights: object = None, **parameters: Any
    ) -> Tensor:
        """One tensor merged through mergekit, the experts called alpha, beta, gamma, 3, 4, ..."""
        ids = [BASE, *[ALPHA, BETA, GAMMA][: len(experts)], *map(str, range(3, len(experts)))]
        given = {**self.parameters, **parameters}
        if weights is not None:
            given["weight"] = weights
        return merge_tensors([base, *experts], self.method, ids=ids, base_index=0, name=name, parameters=given)


def cases() -> Iterator[Case]:
    """Of every registered method, and of the one that docs/adding-a-method.md makes up."""
    for method in (*mergekit_ace.METHODS, documented_method()):
        yield Case(method)
        for parameter in method.own_parameters:
            for choice in _choices(parameter.value_type):
                if choice != parameter.default:
                    yield Case(method, {parameter.name: choice})


def _choices(annotation: Any) -> Iterator[str]:
    """The words that a parameter's type offers; none for numbers and switches."""
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    elif get_origin(annotation) is Annotated:
        yield from _choices(get_args(annotation)[0])
    else:
        for part in get_args(annotation):
            yield from _choices(part)


def drawn(
    count: int, *shape: int, rank: int | None = None, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, list[Tensor]]:
    """A base and experts around it, of unequal strength, with spectra over a factor of ten.

    Args:
        count: experts.
        shape: of the tensor; the last two axes are the matrix.
        rank: of each update, full if None.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, dtype=torch.float64, generator=generator)

    def update() -> Tensor:
        scales = torch.logspace(0, -1, shape[-1], dtype=torch.float64)
        if rank is None:
            return normal(*shape) * scales
        return normal(*shape[:-1], rank) @ normal(rank, shape[-1])

    base = normal(*shape)
    return base.to(dtype), [(base + 0.1 * (1 + t) * update()).to(dtype) for t in range(count)]
