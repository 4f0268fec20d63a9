"""From a recipe and prompts to a moments folder."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from mergekit.common import ModelReference
from mergekit.options import MergeOptions
from torch import Tensor, nn

from mergekit_ace.collecting.activations import InputSampler, sample_inputs
from mergekit_ace.collecting.model import load_model, load_tokenizer, without_head
from mergekit_ace.collecting.prompts import Prompt, PromptError
from mergekit_ace.collecting.targets import Site, find_sites, find_targets, weight_of
from mergekit_ace.collecting.tokens import Encoded, encode, sample
from mergekit_ace.moments.fingerprint import Fingerprint, fingerprint
from mergekit_ace.moments.index import MeasuredTensor
from mergekit_ace.moments.statistics import second_moment
from mergekit_ace.moments.store import MomentsWriter
from mergekit_ace.recipe.plan import Plan

LOG = logging.getLogger("mergekit_ace")

FEWEST_TOKENS = 32
"""An expert's prompts must have as many: the second moment of fewer is that of a few single tokens."""

Progress = Callable[[str, int, int], None]
"""Called with the expert's name, the prompts done, and how many there are."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How moments are measured.

    Attributes:
        by: whose activations: the `base`'s over all prompts, or each `expert`'s own over its prompts.
        tokens: sampled inputs a layer and expert, at most.
        seed: of the choice of tokens.
        dtype: in which models run; `auto` for the one they are stored in.
        device: where they run.
        offload: a folder for what does not fit on the device and in memory; None to hold all of a model.
    """

    by: Literal["base", "expert"] = "base"
    tokens: int = 1024
    seed: int = 0
    dtype: str = "auto"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    offload: str | None = None


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What became of a collection.

    Attributes:
        measured: matrices with moments.
        unmeasured: matrices that keep their estimates, with the reason.
        tokens: sampled, by expert.
    """

    measured: int
    unmeasured: Mapping[str, str]
    tokens: Mapping[str, int]


def collect(
    plan: Plan,
    prompts: Mapping[str, tuple[ModelReference, Sequence[Prompt]]],
    out: Path,
    settings: Settings,
    progress: Progress = lambda name, done, total: None,
) -> Collected:
    """Measure the moments of some of a recipe's experts and write them to a folder.

    Args:
        plan: of the recipe, its adapters unmerged.
        prompts: by the name of the expert.
        out: the folder; new or empty.
        settings: whose activations, how many, where.
        progress: told of every prompt.

    Raises:
        PromptError: a prompt that has no token, or too few in all.
        ModelError: a model that cannot be run.
        RecipeError: the recipe's method takes no moments.
        ValueError: NaN or infinity in the activations.
    """
    assert plan.base is not None
    targets, stacks = find_targets(plan)
    tokenizer = load_tokenizer(plan.base, plan.options)
    encoded = {
        name: _encode(name, listed, tokenizer, plan.base, plan.options, settings)
        for name, (_, listed) in prompts.items()
    }
    writer = MomentsWriter(out)
    base = _load(plan.base, plan, settings)
    sites, without = find_sites(targets, base)
    model: nn.Module | None = base
    if settings.by == "expert":
        del base
        model = None
    for name, (reference, _) in prompts.items():
        digest = _digest(settings, str(reference), encoded[name], sites)
        if writer.take_over(name, digest):
            LOG.info("%s: measured by an earlier run of the same command", name)
            continue
        if settings.by == "expert":
            model = None  # not two at a time
            model = _load(reference, plan, settings)
        assert model is not None
        sampler = _run(model, sites, encoded[name], settings, partial(progress, name))
        writer.add(
            name,
            {key: second_moment(rows) for key, rows in sampler.rows.items() if _tokens(rows) >= FEWEST_TOKENS},
            model=str(reference),
            sources={site.target.name: sampler.source[site.module] for site in sites if site.module in sampler.source},
            weights=_weights(model, sites) if settings.by == "expert" else {},
            digest=digest,
        )
    tensors = {
        site.target.name: MeasuredTensor(
            input=writer.sources[site.target.name], input_first=site.input_first, base=site.target.fingerprint
        )
        for site in sites
        if site.target.name in writer.sources
    }
    writer.finish(by=settings.by, base=str(plan.base), tensors=tensors)
    unmeasured = dict.fromkeys(stacks, "a stack of experts' matrices")
    unmeasured |= {target.name: "no linear layer of the loaded model has this weight" for target in without}
    unmeasured |= {site.target.name: "no token came to it" for site in sites if site.target.name not in writer.sources}
    return Collected(
        measured=len(tensors),
        unmeasured=unmeasured,
        tokens={name: sum(len(prompt.positions) for prompt in listed) for name, listed in encoded.items()},
    )


def _encode(
    name: str,
    prompts: Sequence[Prompt],
    tokenizer: Any,
    model: ModelReference,
    options: MergeOptions,
    settings: Settings,
) -> list[Encoded]:
    config = model.config(trust_remote_code=options.trust_remote_code)
    longest = int(getattr(config.get_text_config(), "max_position_embeddings", None) or 0)
    ids = [encode(prompt, tokenizer, longest=longest) for prompt in prompts]
    encoded = sample(prompts, ids, tokens=settings.tokens, seed=settings.seed)
    found = sum(len(prompt.positions) for prompt in encoded)
    if found < FEWEST_TOKENS:
        raise PromptError(
            f"{name}: its prompts must have at least {FEWEST_TOKENS} tokens in all; got {found} in {len(prompts)} "
            "prompts. Give more prompts, or longer ones"
        )
    return encoded


def _load(reference: ModelReference, plan: Plan, settings: Settings) -> nn.Module:
    return load_model(reference, plan.options, dtype=settings.dtype, device=settings.device, offload=settings.offload)


def _run(
    model: nn.Module,
    sites: Sequence[Site],
    prompts: Sequence[Encoded],
    settings: Settings,
    progress: Callable[[int, int], None],
) -> InputSampler:
    modules = {site.module: model.get_submodule(site.module) for site in sites}
    sampler = InputSampler(modules)
    for done, _ in enumerate(sample_inputs(without_head(model, modules), sampler, prompts, settings.device), start=1):
        progress(done, len(prompts))
    return sampler


def _tokens(rows: Sequence[Tensor]) -> int:
    return sum(len(part) for part in rows)


def _weights(model: nn.Module, sites: Sequence[Site]) -> dict[str, Fingerprint]:
    return {site.target.name: fingerprint(weight_of(model.get_submodule(site.module))) for site in sites}


def _digest(settings: Settings, expert: str, prompts: Sequence[Encoded], sites: Sequence[Site]) -> str:
    """Of everything that the moments of one expert depend on."""
    parts = [settings.by, settings.dtype, expert]
    parts += [f"{prompt.ids} {prompt.positions}" for prompt in prompts]
    parts += [f"{site.module} {site.target}" for site in sites]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
