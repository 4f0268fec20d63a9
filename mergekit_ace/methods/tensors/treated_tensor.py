"""One tensor of every model, with what is to be done to it: what a merge and its inspection both start from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergekit.merge_methods.base import TensorGroup
from torch import Tensor

from mergekit_ace.matrix.expert import Expert
from mergekit_ace.tensor_treatment import Treatment


@dataclass(frozen=True, kw_only=True)
class TreatedTensor:
    """A group of mergekit's, its recipe's parameters resolved.

    Attributes:
        name: printable.
        group: as handed over.
        base: as stored.
        experts: of its shape, with their weights in the recipe.
        treatment: what the method does to it.
        parameters: those in force under that treatment.
        depth: how many blocks of the model follow one another; None where it is not known.
    """

    name: str
    group: TensorGroup
    base: Tensor
    experts: tuple[Expert, ...]
    treatment: Treatment
    parameters: Mapping[str, Any]
    depth: int | None = None
