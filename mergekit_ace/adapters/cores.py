"""The adapters' updates of one matrix in core space."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from mergekit_ace.factors.core_space import CoreSpace, task_vectors_of
from mergekit_ace.factors.model import Place
from mergekit_ace.linalg.factors import Factors
from mergekit_ace.matrix.core_task_vectors import CoreTaskVectors
from mergekit_ace.matrix.expert import MeasuredMoment, Participant


@dataclass(frozen=True, kw_only=True)
class Changed:
    """An adapter's update of one matrix."""

    adapter: str
    weight: float
    factors: Factors


@dataclass(frozen=True, kw_only=True)
class Cores:
    """One matrix of a weight in core space, inputs last as the method takes them.

    Attributes:
        name: how messages call it.
        updates: of the adapters that have it.
        space: what they share.
        turned: the factors are those of the transposed updates.
        measured: each adapter's measured second moment of the inputs; None where the recipe asks for none.
        base_norm: of the base's matrix; None where it is not known or not asked for.
        depth: as in `TaskVectors`.
    """

    name: str
    updates: tuple[Changed, ...]
    space: CoreSpace
    turned: bool
    measured: Sequence[MeasuredMoment | None] | None = None
    base_norm: float | None = None
    depth: int | None = None

    @cached_property
    def task_vectors(self) -> CoreTaskVectors:
        """The cores, for every method to run on."""
        experts = [
            Participant(name=each.adapter, weight=each.weight, measured=self.measured[t] if self.measured else None)
            for t, each in enumerate(self.updates)
        ]
        return task_vectors_of(self.space, experts, name=self.name, base_norm=self.base_norm, depth=self.depth)


def matrices(name: str, place: Place, changed: Sequence[Changed]) -> Iterator[tuple[str, int | None, list[Changed]]]:
    """The matrices of a weight, each with its place in a stack and its updates: one, or one for each stacked expert."""
    if not changed:
        return
    if place.kind != "stack":
        yield name, None, list(changed)
        return
    for index in range(place.shape[0]):
        yield (
            f"{name}[{index}]",
            index,
            [
                replace(each, factors=Factors(left=each.factors.left[index], right=each.factors.right[index]))
                for each in changed
            ],
        )
