"""Parameters that an adapter targets by themselves (`target_parameters`), such as stacked experts.

peft wraps their module once for each, `<module>.base_layer.lora_A` inside of `<module>.lora_A`, in the order in which
the base declares them. The keys do not hold the parameters' names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from mergekit_ace.factors.model import Place
from mergekit_ace.factors.tensors import AdapterError

_WRAPPED = ".base_layer"
# As the stacked experts of transformers declare them.
_ORDER = ("gate_up_proj", "down_proj")

Shape = tuple[int, int]
"""`(m, n)` of one matrix of a parameter, outputs first as peft computes the update."""


def without_wrappers(module: str) -> str:
    """The module that holds the parameters."""
    while module.endswith(_WRAPPED):
        module = module.removesuffix(_WRAPPED)
    return module


def named(modules: Mapping[str, Shape], parameters: Sequence[str]) -> dict[str, str]:
    """Which parameter each wrapper of one module is of, as far as that can be told.

    Args:
        modules: the wrappers, and the shapes of their updates.
        parameters: of the module, that the adapter targets.

    Returns:
        by wrapper; empty where it cannot be told.
    """
    if len(parameters) == 1 and len(modules) == 1:
        return dict.fromkeys(modules, parameters[0])
    if len(modules) == 2 and set(parameters) == set(_ORDER):
        first, second = modules
        if _feed(modules[first], modules[second]):
            return dict(zip((first, second), _ORDER, strict=True))
        if _feed(modules[second], modules[first]):
            return dict(zip((second, first), _ORDER, strict=True))
    return {}


def _feed(gate_up: Shape, down: Shape) -> bool:
    """Whether two shapes are those of gates and values side by side, and of what takes their product back.

    Some models store both inputs first, which peft takes for outputs.
    """
    return (gate_up[0] == 2 * down[1] and gate_up[1] == down[0]) or (
        gate_up[1] == 2 * down[0] and gate_up[0] == down[1]
    )


def nested(places: Iterable[Place]) -> dict[str, Place]:
    """The same places by weight, wrapped as in one adapter that has all of them.

    Raises:
        AdapterError: their order cannot be told.
    """
    found = {place.weight: place for place in places}
    owners: dict[str, list[Place]] = {}
    for place in found.values():
        if place.declared is not None:
            owners.setdefault(without_wrappers(place.module), []).append(place)
    for owner, own in owners.items():
        names = [place.weight.removeprefix(f"{owner}.") for place in own]
        if len(own) == 1 and own[0].weight != own[0].module:
            found[own[0].weight] = replace(own[0], module=owner)
        elif set(names) == set(_ORDER):
            for place, name in zip(own, names, strict=True):
                found[place.weight] = replace(place, module=owner if name == _ORDER[-1] else f"{owner}{_WRAPPED}")
        elif len({place.module for place in own}) < len(own) or any(place.weight != place.module for place in own):
            raise AdapterError(
                f"adapters must target the same parameters of {owner} (target_parameters), whose order in the base "
                f"cannot be told from them; got {', '.join(sorted(names))}. Merge adapters that target the same ones"
            )
    return found
