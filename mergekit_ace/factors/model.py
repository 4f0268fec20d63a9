"""An adapter as the updates it makes: low-rank factors for each weight, and the tensors that it replaces."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from mergekit_ace.linalg.factors import Factors

Kind = Literal["linear", "embedding", "convolution", "stack"]
Layout = Literal["peft", "kohya", "diffusers"]


@dataclass(frozen=True, kw_only=True)
class Place:
    """A weight that adapters update, as one of them describes it.

    Attributes:
        module: the module's name in the base model, without a layout's prefix.
        kind: what the module is, which decides how its factors are stored.
        shape: of the update, outputs first: `(m, n)`; `(m, n, *kernel)` of a convolution; `(E, m, n)` of `E` experts.
        transposed: the base stores the weight inputs first: Conv1D layers, embedding tables.
        declared: how error messages and recipes call the weight, where not `module.weight`.
    """

    module: str
    kind: Kind
    shape: tuple[int, ...]
    transposed: bool = False
    declared: str | None = None

    @property
    def weight(self) -> str:
        """Name of the weight, for filters of a recipe and for messages."""
        return self.declared or f"{self.module}.weight"

    @property
    def name(self) -> str:
        """As `weight`, for what takes anything that has a tensor's name."""
        return self.weight

    @property
    def matrix(self) -> tuple[int, int]:
        """`(m, n)` of the matrix, or of each of them, whose factors are stored; a kernel counts as inputs."""
        if self.kind == "stack":
            return self.shape[1], self.shape[2]
        return self.shape[0], math.prod(self.shape[1:])

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the base's weight."""
        return (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.transposed else self.shape


def no_update(place: Place) -> Factors:
    """Factors of rank 1 that leave a weight as it is."""
    m, n = place.matrix
    stack = place.shape[:1] if place.kind == "stack" else ()
    return Factors(left=torch.zeros(*stack, m, 1, device="cpu"), right=torch.zeros(*stack, 1, n, device="cpu"))


def padded(factors: Factors, rank: int) -> Factors:
    """The same update by factors of a rank, filled up with zeros."""
    missing = rank - factors.rank
    if missing <= 0:
        return factors
    return Factors(left=pad(factors.left, (0, missing)), right=pad(factors.right, (0, 0, 0, missing)))


@dataclass(frozen=True, kw_only=True)
class Update:
    """The update of one weight, read when it is asked for."""

    place: Place
    rank: int
    read: Callable[[], Factors]


@dataclass(frozen=True, kw_only=True)
class Vector:
    """A tensor of an adapter that is no low-rank update, read when it is asked for."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class TokenRows:
    """Rows of an embedding table that an adapter replaces.

    Attributes:
        indices: which tokens, in the order of the rows.
        rows: `[tokens, dimensions]`.
    """

    indices: tuple[int, ...]
    rows: Vector


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One adapter.

    Attributes:
        name: how messages call it.
        layout: how its files name their tensors.
        base: the base model that its configuration names; None where it names none.
        updates: low-rank updates, by the weight's name.
        bias_updates: what is added to a module's bias, by the module's name.
        replaced: tensors that take the place of the base's (modules_to_save, biases), by their key in the file.
        tokens: rows of embedding tables that take the place of the base's, by the module's name.
        settings: the adapter's configuration, where it has one.
    """

    name: str
    layout: Layout
    base: str | None
    updates: Mapping[str, Update]
    bias_updates: Mapping[str, Vector] = field(default_factory=dict)
    replaced: Mapping[str, Vector] = field(default_factory=dict)
    tokens: Mapping[str, TokenRows] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
