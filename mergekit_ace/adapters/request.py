"""What a merge of adapters is asked for: adapters, method and, for every weight, its parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from mergekit.config import ParameterSetting

from mergekit_ace.adapters.truncation import Rank
from mergekit_ace.factors.formats.peft_parameters import nested
from mergekit_ace.factors.model import Adapter, Place
from mergekit_ace.factors.tensors import AdapterError
from mergekit_ace.mergekit_internals import resolve_parameters
from mergekit_ace.methods.layerwise import LayerwiseMethod

Settings = Mapping[str, ParameterSetting] | None
_LAYER = re.compile(r"\.(\d+)(?:\.|$)")


@dataclass(frozen=True, kw_only=True)
class Request:
    """A merge of adapters.

    Attributes:
        adapters: two or more, or one; of one layout.
        method: of the catalogue.
        shared: a recipe's `parameters`.
        own: the `parameters` of each adapter, in their order.
        base: the model that they are adapters of; None to take their own word for it, which then must be the same.
        rank: of the result.
        dtype: that its tensors are stored in.
        layers: of the base, where its configuration is at hand: gradients of parameters run along them.
    """

    adapters: tuple[Adapter, ...]
    method: LayerwiseMethod
    shared: Settings = None
    own: Sequence[Settings] = ()
    base: str | None = None
    rank: Rank = None
    dtype: torch.dtype = torch.float32
    layers: int | None = None
    _places: dict[str, Place] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        _require_one_layout(self.adapters)
        _require_kinship(self.adapters, self.base)
        _require_alike_names(self.adapters)
        self._places.update(nested(_common_places(self.adapters).values()))
        _require_one_form(self.adapters, self._places)

    @property
    def base_name(self) -> str | None:
        """The base model's name or path, where an adapter or the caller gives it."""
        return self.base or next((adapter.base for adapter in self.adapters if adapter.base), None)

    @property
    def places(self) -> Mapping[str, Place]:
        """Every weight that an adapter updates, in the order of the first that has it."""
        return self._places

    def having(self, place: Place, weights: Sequence[float]) -> dict[str, bool]:
        """Each adapter's name -> whether it changes a weight, with a positive weight in the merge."""
        found = dict.fromkeys((adapter.name for adapter in self.adapters), False)
        for adapter, weight in zip(self.adapters, weights, strict=True):
            found[adapter.name] |= place.weight in adapter.updates and weight > 0
        return found

    def parameters(self, name: str) -> Mapping[str, Any]:
        """The method's parameters for a tensor; `weight` holds one number for each adapter, in their order."""
        own = self.own or [None] * len(self.adapters)

        def sources(adapter: Any) -> Iterable[Settings]:
            return [self.shared] if adapter is None else [own[adapter], self.shared]

        shared, each = resolve_parameters(
            self.method.spec,
            tensor_name=name,
            # Their places stand for the adapters: mergekit's own references cannot be had for a state dict.
            inputs=dict.fromkeys(range(len(self.adapters)), name),  # type: ignore[arg-type]
            sources=sources,
            t=self._position(name),
        )
        scoped = {
            parameter.name: tuple(each[t][parameter.name] for t in range(len(self.adapters)))  # type: ignore[index]
            for parameter in self.method.spec.input_parameters
        }
        return {**shared, **scoped}

    def _position(self, name: str) -> float:
        """Where a tensor's layer is between the first, 0, and the last, 1; as mergekit has it."""
        found = _LAYER.search(name)
        if found is None:
            return 0.0
        layers = self.layers or 1 + max(int(m[1]) for place in self._places if (m := _LAYER.search(place)))
        return int(found[1]) / (layers - 1) if layers > 1 else 1.0


def _require_one_layout(adapters: Sequence[Adapter]) -> None:
    if not adapters:
        raise AdapterError("a merge of adapters must have at least one; got none")
    first = adapters[0]
    for other in adapters[1:]:
        if other.layout != first.layout:
            raise AdapterError(
                f"adapters must have keys of one layout; {first.name} has those of {first.layout}, {other.name} those "
                f"of {other.layout}. Convert one of them"
            )


def _common_places(adapters: Sequence[Adapter]) -> dict[str, Place]:
    places: dict[str, Place] = {}
    owners: dict[str, str] = {}
    for adapter in adapters:
        for name, update in adapter.updates.items():
            known = places.setdefault(name, update.place)
            owner = owners.setdefault(name, adapter.name)
            if (known.kind, known.shape, known.transposed) != (
                update.place.kind,
                update.place.shape,
                update.place.transposed,
            ):
                raise AdapterError(
                    f"{name} must be the same weight for all adapters; it is {_described(known)} for {owner} and "
                    f"{_described(update.place)} for {adapter.name}. Merge adapters of one base model"
                )
    return places


def _require_one_form(adapters: Sequence[Adapter], places: Mapping[str, Place]) -> None:
    """A weight cannot be updated and replaced at once."""
    for adapter in adapters:
        for key in adapter.replaced:
            name = key.removeprefix("base_model.model.")
            if name in places:
                other = next(a.name for a in adapters if name in a.updates)
                raise AdapterError(
                    f"{name} must be adapted by factors in all adapters, or saved whole in all; it is adapted by "
                    f"{other}, and saved whole by {adapter.name} (modules_to_save). Train one of them like the other"
                )


def _described(place: Place) -> str:
    return f"{place.kind} {place.shape}" + (", stored inputs first," if place.transposed else "")


def _require_kinship(adapters: Sequence[Adapter], base: str | None) -> None:
    """Adapters of different models often fit by their shapes, and their sum means nothing."""
    named = [(adapter.name, adapter.base) for adapter in adapters if adapter.base]
    if base is None:
        for name, theirs in named[1:]:
            if model_name(theirs) != model_name(named[0][1]):
                raise AdapterError(
                    f"adapters must be of one base model; {named[0][0]} was trained on {named[0][1]}, {name} on "
                    f"{theirs}. Name the base that they share (base=) if both are the same model"
                )
    same_base = len(named) == len(adapters) and len({model_name(theirs) for _, theirs in named}) == 1
    stems = [_stems(adapter) for adapter in adapters]
    for adapter, own in zip(adapters, stems, strict=True):
        others = set[str]().union(*(other for other in stems if other is not own))
        if len(adapters) > 1 and not same_base and not own & others:
            raise AdapterError(
                f"adapters of one base must have modules in common; {adapter.name} has {', '.join(sorted(own))}, the "
                f"others have {', '.join(sorted(others))}. Check that it is an adapter of the same model"
            )


def _require_alike_names(adapters: Sequence[Adapter]) -> None:
    """Adapters whose modules have the same names but for a beginning, which a wrapper of the model has put there."""
    for adapter in adapters:
        for other in adapters:
            pairs = [
                (longer, name)
                for longer in adapter.updates
                if longer not in other.updates and (name := _ending(longer, other.updates)) is not None
            ]
            if pairs and len(pairs) == len(adapter.updates):
                longer, name = pairs[0]
                raise AdapterError(
                    f"adapters of one base must name its modules alike; {adapter.name} has {longer} where "
                    f"{other.name} has {name}. Rename the keys of one of them"
                )


def _ending(longer: str, names: Mapping[str, Any]) -> str | None:
    """The end of a dotted name that is one of the names."""
    parts = longer.split(".")
    endings = (".".join(parts[start:]) for start in range(1, len(parts)))
    return next((ending for ending in endings if ending in names), None)


def _stems(adapter: Adapter) -> set[str]:
    """Names of its modules up to the number of their layer: those of two architectures differ."""
    names = [*(update.place.module for update in adapter.updates.values()), *adapter.replaced, *adapter.tokens]
    return {_LAYER.split(name, maxsplit=1)[0].removeprefix("base_model.model.") for name in names}


def model_name(base: str | None) -> str:
    """The last part of a path or of a hub's name: people keep one model at many places."""
    return (base or "").rstrip("/").rpartition("/")[2]
