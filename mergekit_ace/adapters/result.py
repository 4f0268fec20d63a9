"""What a merge of adapters gives: tensors, configuration and report, on their way to memory or to a folder."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mergekit_ace
from mergekit_ace.adapters.merge import AdapterMerge
from mergekit_ace.adapters.merged_weight import WeightReport
from mergekit_ace.adapters.other_tensors import merged_biases, merged_replacements, merged_tokens
from mergekit_ace.adapters.request import Request
from mergekit_ace.factors.formats.diffusers import write_diffusers
from mergekit_ace.factors.formats.kohya import write_kohya
from mergekit_ace.factors.formats.peft_keys import with_wrapper
from mergekit_ace.factors.formats.peft_output import Configuration, bias_key, biased, tokens_key, write_peft
from mergekit_ace.factors.formats.peft_settings import unknown_settings
from mergekit_ace.factors.model import Layout, Place, no_update, padded
from mergekit_ace.factors.tensors import AdapterError
from mergekit_ace.linalg.factors import Factors

# Modules of single experts, which transformers 5 stacks when it loads them: with one rank, and none left out.
_OF_EXPERT = re.compile(r"\.experts\.\d+\.")
LOG = logging.getLogger("mergekit_ace")

_WRITERS: dict[Layout, Callable[[Place, Factors], dict[str, Tensor]]] = {
    "peft": write_peft,
    "kohya": write_kohya,
    "diffusers": write_diffusers,
}


@dataclass(frozen=True, kw_only=True)
class OtherReport:
    """A tensor that is no low-rank update: what it is, and who has it."""

    name: str
    treatment: str
    adapters: tuple[str, ...]


@dataclass
class AdapterReport:
    """What a merge of adapters did.

    Attributes:
        method: its name in recipes.
        adapters: their names.
        base: the model that they are adapters of.
        weights: one entry for every weight that an adapter updates.
        others: biases, whole modules and rows of tables.
    """

    method: str
    adapters: tuple[str, ...]
    base: str | None
    weights: list[WeightReport] = field(default_factory=list)
    others: list[OtherReport] = field(default_factory=list)

    @property
    def energy_kept(self) -> float:
        """Share of the merged updates' energy that the rank holds, over all weights."""
        total = sum(weight.norm**2 for weight in self.weights)
        return sum(weight.norm**2 * weight.energy_kept for weight in self.weights) / total if total else 1.0

    @property
    def rank(self) -> int:
        """The largest rank of a merged update."""
        return max((weight.rank for weight in self.weights), default=0)

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "version": mergekit_ace.__version__,
            "method": self.method,
            "base": self.base,
            "adapters": list(self.adapters),
            "rank": self.rank,
            "energy_kept": self.energy_kept,
            "weights": [asdict(weight) for weight in self.weights],
            "others": [asdict(other) for other in self.others],
        }


class Outcome:
    """A merge under way: hands out tensors, and has configuration and report when all were taken."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.layout: Layout = request.adapters[0].layout
        self.report = AdapterReport(
            method=request.method.name, adapters=tuple(a.name for a in request.adapters), base=request.base_name
        )
        self.configuration = Configuration(adapters=request.adapters, base=request.base_name)
        for adapter in request.adapters:
            if unknown := unknown_settings(adapter.settings):
                LOG.warning(
                    "The configuration of the adapter %s has settings that the installed peft does not know: %s. They "
                    "have no part in the merge; make sure that they do not change the update.",
                    adapter.name,
                    ", ".join(unknown),
                )

    def names(self) -> list[str]:
        """Names of all tensors that may come."""
        like = torch.empty(1, 1, device="cpu")
        names = [name for place in self.request.places.values() for name in _names(self.layout, place, like)]
        names += [bias_key(place.module) for place in biased(self.request.places.values())]
        for adapter in self.request.adapters:
            names += [
                *adapter.replaced,
                *map(with_wrapper, adapter.replaced),
                *(tokens_key(module) for module in adapter.tokens),
            ]
        return list(dict.fromkeys(names))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the merged adapter, in the dtype that was asked for.

        Raises:
            AdapterError: nothing is left to write, or as `AdapterMerge.weights`.
            OverflowError: a number exceeds the range of that dtype.
        """
        written = 0
        for merged in AdapterMerge(self.request).weights():
            self.report.weights.append(merged.report)
            factors = merged.factors
            expert = self.layout == "peft" and _OF_EXPERT.search(merged.place.module) is not None
            if factors is None and merged.place.declared is None and not expert:
                self.configuration.dropped = True
                continue
            written += factors is not None
            # A parameter that keeps the base's values still has its wrapper, within which the others are.
            factors = no_update(merged.place) if factors is None else factors
            factors = padded(factors, self._common_rank) if expert else factors
            self.configuration.add(merged.place, factors.rank)
            for name, tensor in _WRITERS[self.layout](merged.place, factors).items():
                yield name, self._stored(name, tensor)
        for name, tensor in self._others():
            written += 1
            yield name, self._stored(name, tensor)
        if written == 0:
            raise AdapterError("the merged adapter must change something; no adapter changes a weight that is merged")

    @cached_property
    def _common_rank(self) -> int:
        """A rank that no merged update exceeds."""
        ranks = [
            sum(adapter.updates[name].rank for adapter in self.request.adapters if name in adapter.updates)
            for name in self.request.places
        ]
        return min(max(ranks), self.request.rank) if isinstance(self.request.rank, int) else max(ranks)

    def _others(self) -> Iterator[tuple[str, Tensor]]:
        merged_at: dict[str, Tensor] = {}
        for merged in merged_biases(self.request):
            self._note(f"{merged.name}.bias", "added to a bias, averaged", merged.adapters)
            merged_at[merged.name] = merged.tensor
        if merged_at:
            self.configuration.with_biases = True
            # peft reads one for every module, or leaves a random one.
            for place in biased(self.configuration.places.values()):
                zeros = torch.zeros(place.shape[0], device="cpu")
                yield bias_key(place.module), merged_at.get(place.module, zeros)
        for merged in merged_replacements(self.request):
            self._note(
                merged.name, "replaces the base's tensor, averaged over the adapters that have it", merged.adapters
            )
            self.configuration.replaced.append(merged.name)
            yield self.configuration.key_of(merged.name), merged.tensor
        for merged in merged_tokens(self.request):
            self._note(f"{merged.name}.weight", f"{len(merged.indices)} tokens, each averaged", merged.adapters)
            self.configuration.tokens[merged.name] = list(merged.indices)
            yield tokens_key(merged.name), merged.tensor

    def _note(self, name: str, treatment: str, adapters: tuple[str, ...]) -> None:
        self.report.others.append(OtherReport(name=name, treatment=treatment, adapters=adapters))

    def _stored(self, name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or name.endswith(".alpha"):
            return tensor
        stored = tensor.to(self.request.dtype)
        if not bool(torch.isfinite(stored).all()):
            raise OverflowError(
                f"{name}: every number must be finite; the merge exceeds the range of {self.request.dtype}. "
                "Set out_dtype: float32"
            )
        return stored


@dataclass(frozen=True, kw_only=True)
class MergedAdapter:
    """A merged adapter in memory.

    Attributes:
        tensors: by the keys of the adapters' layout; of peft's for `peft.set_peft_model_state_dict`.
        configuration: of peft; None in the other layouts.
        layout: of the keys.
        report: what became of every weight.
    """

    tensors: dict[str, Tensor]
    configuration: dict[str, Any] | None
    layout: Layout
    report: AdapterReport


def in_memory(request: Request) -> MergedAdapter:
    """Merge, and keep everything."""
    outcome = Outcome(request)
    tensors = dict(outcome.tensors())
    return MergedAdapter(
        tensors=tensors,
        configuration=outcome.configuration.document() if outcome.layout == "peft" else None,
        layout=outcome.layout,
        report=outcome.report,
    )


def write_json(document: object, file: Path) -> None:
    """A JSON file for people too."""
    file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _names(layout: Layout, place: Place, like: Tensor) -> list[str]:
    shape = (*(1 for _ in place.shape),)
    small = Place(module=place.module, kind=place.kind, shape=shape, declared=place.declared)
    factors = Factors(left=like[None], right=like[None]) if place.kind == "stack" else Factors(left=like, right=like)
    return list(_WRITERS[layout](small, factors))
