"""A merged adapter in peft's layout: its tensors and its configuration.

Every module's alpha is its rank, so that no module scales its factors, and `r` is the largest rank, so that programs
that read it alone reserve enough. The patterns name modules exactly: peft takes them for regular expressions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mergekit_ace.factors.conversion import to_stack
from mergekit_ace.factors.formats.peft_keys import PREFIX, with_wrapper
from mergekit_ace.factors.formats.peft_parameters import without_wrappers
from mergekit_ace.factors.model import Adapter, Place
from mergekit_ace.factors.tensors import AdapterError
from mergekit_ace.linalg.factors import Factors

_SAME = ("task_type", "revision", "auto_mapping")
_NARROWING = ("layers_to_transform", "layers_pattern", "exclude_modules")


def write_peft(place: Place, factors: Factors) -> dict[str, Tensor]:
    """The tensors of one merged module."""
    prefix = f"{PREFIX}{place.module}"
    if place.kind == "embedding":
        return {f"{prefix}.lora_embedding_A": factors.right, f"{prefix}.lora_embedding_B": factors.left}
    down, up = factors.right, factors.left
    if place.kind == "stack":
        down, up = to_stack(factors)
    elif place.kind == "convolution":
        down = down.reshape(-1, *place.shape[1:])
        up = up.reshape(*up.shape, *(1 for _ in place.shape[2:]))
    return {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}


@dataclass
class Configuration:
    """Collects what was written, and makes `adapter_config.json` of it."""

    adapters: Sequence[Adapter]
    base: str | None
    places: dict[str, Place] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    dropped: bool = False
    replaced: list[str] = field(default_factory=list)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    with_biases: bool = False

    def key_of(self, replaced: str) -> str:
        """The key of a tensor that takes the place of the base's, in a model with this adapter."""
        module = replaced.removeprefix(PREFIX).removesuffix(".bias")
        adapted = any(place.module == module for place in self.places.values())
        return with_wrapper(replaced) if replaced.endswith(".bias") and adapted else replaced

    def add(self, place: Place, rank: int) -> None:
        """Note a module that was written."""
        self.places[place.weight] = place
        self.ranks[place.weight] = rank

    def document(self) -> dict[str, Any]:
        """What peft reads."""
        r = max(self.ranks.values(), default=1)
        patterns = {self._pattern(name): rank for name, rank in self.ranks.items() if rank != r}
        biases = {str(adapter.settings.get("bias", "none")) for adapter in self.adapters}
        parameters = sorted(
            {str(target) for adapter in self.adapters for target in adapter.settings.get("target_parameters") or []}
        )
        return {
            "peft_type": "LORA",
            "base_model_name_or_path": self.base,
            **{key: self._common(key) for key in _SAME},
            "r": r,
            "lora_alpha": r,
            "rank_pattern": patterns,
            "alpha_pattern": patterns,
            "use_rslora": False,
            "use_dora": False,
            "lora_dropout": 0.0,
            "fan_in_fan_out": any(place.kind == "linear" and place.transposed for place in self.places.values()),
            "bias": next((bias for bias in ("all", "lora_only") if bias in biases), "none"),
            "lora_bias": self.with_biases,
            "init_lora_weights": True,
            "target_modules": self._targets(),
            "target_parameters": parameters or None,
            "modules_to_save": self._modules_to_save(),
            "trainable_token_indices": self.tokens or None,
            "layer_replication": self._common("layer_replication", required=True),
            "inference_mode": True,
        }

    def _pattern(self, name: str) -> str:
        place = self.places[name]
        if place.declared != place.module:
            return "^" + re.escape(place.declared or place.module)
        # Which parameter of its module it is cannot be told; those of one module have one rank.
        return "^" + re.escape(without_wrappers(place.module)) + r"\..+"

    def _targets(self) -> list[str]:
        """Short names where they mean these modules and no others, full names otherwise."""
        listed: set[str] = set()
        modules = [place.module for place in self.places.values() if place.declared is None]
        exact = self.dropped
        for adapter in self.adapters:
            targets = adapter.settings.get("target_modules")
            narrowed = any(adapter.settings.get(option) for option in _NARROWING)
            if narrowed or isinstance(targets, str) or not isinstance(targets, Sequence):
                exact = True
            else:
                listed.update(str(target) for target in targets)
        used = {target for target in listed if any(_matches(target, module) for module in modules)}
        if exact or used != listed or not all(any(_matches(target, module) for target in used) for module in modules):
            return modules
        return sorted(used)

    def _modules_to_save(self) -> list[str] | None:
        named = {str(name) for adapter in self.adapters for name in adapter.settings.get("modules_to_save") or []}
        kept = sorted(name for name in named if any(f".{name}." in f".{key}" for key in self.replaced))
        return kept or None

    def _common(self, key: str, *, required: bool = False) -> Any:
        values = [adapter.settings.get(key) for adapter in self.adapters]
        if all(value == values[0] for value in values):
            return values[0]
        if required:
            raise AdapterError(f"adapters must have the same {key}; got {values[0]} and others")
        return None


def bias_key(module: str) -> str:
    """The key of what is added to a module's bias."""
    return f"{PREFIX}{module}.lora_B.bias"


def tokens_key(module: str) -> str:
    """The key of the rows that replace those of a table."""
    return f"{PREFIX}{module}.token_adapter.trainable_tokens_delta"


def biased(places: Iterable[Place]) -> list[Place]:
    """Modules that peft gives a bias of their own under `lora_bias`."""
    return [place for place in places if place.kind in ("linear", "convolution")]


def _matches(target: str, module: str) -> bool:
    return module == target or module.endswith(f".{target}")
