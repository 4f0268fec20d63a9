"""A recipe of adapters examined before its merge, from the adapters alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_ace.adapters.effect import require_effect
from mergekit_ace.adapters.from_recipe import request_of
from mergekit_ace.adapters.merge import AdapterMerge
from mergekit_ace.adapters.merged_weight import WeightReport
from mergekit_ace.adapters.moments import check_moments
from mergekit_ace.adapters.other_tensors import require_shapes
from mergekit_ace.adapters.request import Request, model_name
from mergekit_ace.adapters.truncation import Rank
from mergekit_ace.checks.adapter_fit import check_fit
from mergekit_ace.checks.adapters import check_known
from mergekit_ace.checks.duplicates import check_duplicates
from mergekit_ace.checks.moments_hint import suggest_moments
from mergekit_ace.checks.spelling import check_keys, check_parameters
from mergekit_ace.factors.tensors import AdapterError
from mergekit_ace.mergekit_internals import in_recipe_order
from mergekit_ace.recipe.failures import READING, RecipeError, message_of
from mergekit_ace.recipe.findings import Finding, by_severity
from mergekit_ace.recipe.reading import read_recipe

# Below this share of an expert's own output a layer is named.
_LITTLE = 0.5


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What the merge will give.

    Attributes:
        adapters: their names, each with its largest rank.
        weights: how many weights they update, and how many of them more than one adapter does.
        shared: of these.
        rank: the largest rank of the result.
        size: of the result's tensors, in bytes.
        merged: every weight merged to the rank that was asked for; None where none was.
    """

    adapters: tuple[tuple[str, int], ...]
    weights: int
    shared: int
    rank: int
    size: int
    merged: tuple[WeightReport, ...] | None = None

    @property
    def energy_kept(self) -> float:
        """Share of the merged updates' energy that the rank holds, over all weights."""
        total = sum(weight.norm**2 for weight in self.merged or ())
        return sum(w.norm**2 * w.energy_kept for w in self.merged or ()) / total if total else 1.0

    @property
    def outputs_kept(self) -> float:
        """Share of the experts' own outputs that is kept, in the mean of weights and experts."""
        kept = [share for weight in self.merged or () for share in weight.outputs_kept]
        return sum(kept) / len(kept) if kept else 1.0


@dataclass(frozen=True, kw_only=True)
class AdapterExamination:
    """What was found, and what the merge will give."""

    findings: tuple[Finding, ...]
    """Errors first."""
    outlook: Outlook | None
    """None where errors keep the merge from being made."""

    def count(self, level: str) -> int:
        """How many findings are of a level."""
        return sum(finding.level == level for finding in self.findings)


def examine_adapters(file: Path, options: MergeOptions | None = None, *, rank: Rank = None) -> AdapterExamination:
    """Find what would stop or spoil `merge --adapter`, and what a rank costs; writes nothing.

    Args:
        file: the recipe.
        options: of `mergekit-yaml`; its defaults when None.
        rank: to merge to, in memory; None: the adapters are read, and nothing is merged.
    """
    try:
        recipe = read_recipe(file)
    except RecipeError as error:
        return _stopped([], str(error))
    findings = [
        *check_duplicates(recipe.text),
        *check_keys(recipe.document),
        *check_parameters(recipe.document),
    ]
    try:
        request = request_of(recipe.config, options or MergeOptions(), rank=rank)
        findings += _of_adapters(request)
        findings += suggest_moments(file, recipe.config, request.method, map(request.parameters, request.places))
        require_effect(request.adapters)
        findings += _of_base(recipe.config, options or MergeOptions())
        outlook = _outlook(request)
    except READING as error:
        return _stopped(findings, message_of(error))
    if outlook.merged is not None:
        findings += _of_rank(outlook.merged)
    return AdapterExamination(findings=by_severity(findings), outlook=outlook)


def _stopped(findings: list[Finding], what: str) -> AdapterExamination:
    stop = Finding(level="error", what=what, remedy="mergekit-ace merge --adapter would stop at the same place.")
    return AdapterExamination(findings=by_severity([*findings, stop]), outlook=None)


def _of_adapters(request: Request) -> Iterator[Finding]:
    for adapter in request.adapters:
        if adapter.base and request.base and model_name(adapter.base) != model_name(request.base):
            yield Finding(
                level="warning",
                what=f"the adapter {adapter.name} was trained on {adapter.base}, but is put on {request.base}",
                remedy=f"Write {adapter.base}+{adapter.name}, unless both are the same model.",
            )
        yield from check_known(adapter.name, adapter.settings)
        alone = [name for name in adapter.updates if _owners(request, name) == 1]
        if len(request.adapters) > 1 and len(alone) == len(adapter.updates) > 0:
            yield Finding(
                level="hint",
                what=f"no weight of the adapter {adapter.name} is adapted by another: its update is taken over whole",
                remedy="Nothing to do, if that is what you mean.",
            )
    scale = request.shared is not None and "lambda" in request.shared
    if scale and any(adapter.replaced or adapter.tokens for adapter in request.adapters):
        yield Finding(
            level="warning",
            what="lambda has no effect on whole modules, biases and tokens that adapters save: they replace the base's",
            remedy="Remove lambda, or save the adapters without them.",
        )
    require_shapes(request)
    merge = AdapterMerge(request)
    yield from check_moments(request, merge)
    for name, place in request.places.items():
        parameters = request.parameters(name)
        if merge.treat(place, parameters).kind not in ("base", "buffer"):
            merge.read(place, parameters["weight"])
        reason = request.method.needs_entries(parameters)
        if reason and place.kind != "convolution":
            raise AdapterError(f"{name}: {reason}")


def _of_base(config: MergeConfiguration, options: MergeOptions) -> Iterator[Finding]:
    """What peft would not load of each adapter, where the base's configuration is on this disk."""
    for model in in_recipe_order(config):
        for finding in check_fit(model, options):
            # The merge itself needs no base.
            yield replace(finding, level="warning") if finding.level == "error" else finding


def _of_rank(merged: tuple[WeightReport, ...]) -> Iterator[Finding]:
    poor = [weight for weight in merged if weight.outputs_kept and min(weight.outputs_kept) < _LITTLE]
    if poor:
        worst = min(poor, key=lambda weight: min(weight.outputs_kept))
        expert = worst.adapters[worst.outputs_kept.index(min(worst.outputs_kept))]
        yield Finding(
            level="warning",
            what=f"in {len(poor)} of {len(merged)} weights an adapter keeps less than half of its own output; "
            f"least {expert} in {worst.name}, {min(worst.outputs_kept):.0%}",
            remedy="Raise --rank, or leave it out for a merge without loss.",
        )


def _outlook(request: Request) -> Outlook:
    merged = None
    if request.rank is not None:
        merged = tuple(weight.report for weight in AdapterMerge(request).weights())
        ranks = {weight.name: weight.rank for weight in merged}
    else:
        ranks = {name: _lossless(request, name) for name in request.places}
    numbers = 0
    for name, place in request.places.items():
        m, n = place.matrix
        numbers += ranks.get(name, 0) * (m + n) * (place.shape[0] if place.kind == "stack" else 1)
    return Outlook(
        adapters=tuple((a.name, max((u.rank for u in a.updates.values()), default=0)) for a in request.adapters),
        weights=len(request.places),
        shared=sum(_owners(request, name) > 1 for name in request.places),
        rank=max(ranks.values(), default=0),
        size=numbers * request.dtype.itemsize,
        merged=merged,
    )


def _owners(request: Request, name: str) -> int:
    return sum(name in adapter.updates for adapter in request.adapters)


def _lossless(request: Request, name: str) -> int:
    total = sum(adapter.updates[name].rank for adapter in request.adapters if name in adapter.updates)
    return min(total, *request.places[name].matrix)
