"""From a recipe and prompts to a moments folder."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from mergekit.common import ModelReference
from torch import Tensor, nn

from mergekit_ace.checkpoints.fingerprint import fingerprint as file_fingerprint
from mergekit_ace.collecting.activations import InputSampler, sample_inputs
from mergekit_ace.collecting.model import load_model, load_tokenizer, longest_text, without_head
from mergekit_ace.collecting.prompts import Prompt, PromptError
from mergekit_ace.collecting.self_prompts import Sampler
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
"""Called with what is done (the expert's name and `sampling` or `measuring`), how many prompts, and of how many."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How moments are measured.

    Attributes:
        by: whose activations: the `base`'s over all prompts, or each `expert`'s own over its prompts.
        tokens: sampled inputs a layer and expert, at most.
        self_prompts: how many prompts an expert generates that is given none.
        seed: of the choice of tokens, and of what experts generate.
        dtype: in which models run; `auto` for the one they are stored in.
        device: where they run.
        offload: a folder for what does not fit on the device and in memory; None to hold all of a model.
    """

    by: Literal["base", "expert"] = "base"
    tokens: int = 1024
    self_prompts: int = 0
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
    prompts: Mapping[str, tuple[ModelReference, Sequence[Prompt] | None]],
    out: Path,
    settings: Settings,
    progress: Progress = lambda name, done, total: None,
) -> Collected:
    """Measure the moments of some of a recipe's experts and write them to a folder.

    Args:
        plan: of the recipe, its adapters unmerged.
        prompts: by the name of the expert; None for what it generates.
        out: the folder; new or empty.
        settings: whose activations, how many, where.
        progress: told of every prompt.

    Raises:
        PromptError: a prompt that has no token, or too few in all; an expert that generates no text.
        ModelError: a model that cannot be run.
        RecipeError: the recipe's method takes no moments.
        ValueError: NaN or infinity in the activations.
    """
    assert plan.base is not None
    targets, stacks = find_targets(plan)
    tokenizer = load_tokenizer(plan.base, plan.options)
    longest = longest_text(plan.base, tokenizer, plan.options)
    given = {
        name: _chosen(name, listed, [encode(prompt, tokenizer, longest=longest) for prompt in listed], settings)
        for name, (_, listed) in prompts.items()
        if listed is not None
    }
    samplers = {
        name: Sampler(name, tokenizer, longest=longest) for name, (_, listed) in prompts.items() if listed is None
    }
    writer = MomentsWriter(out)
    models = _OneModel(plan, settings)
    sites, without = find_sites(targets, models.of(plan.base))
    for name, (reference, _) in prompts.items():
        if name in given:
            digest = _digest(settings, str(reference), sites, [f"{p.ids} {p.positions}" for p in given[name]])
        else:
            digest = _digest(settings, str(reference), sites, _generation_depends_on(reference, settings))
        if writer.take_over(name, digest):
            LOG.info("%s: measured by an earlier run of the same command", name)
            continue
        if name in given:
            texts = given[name]
        else:
            found = samplers[name].sample(
                models.of(reference),
                settings.self_prompts,
                seed=settings.seed,
                device=settings.device,
                progress=partial(progress, f"{name}, sampling"),
            )
            origins = [Prompt(where=f"{name}, from {text.where}") for text in found]
            texts = _chosen(name, origins, [text.ids for text in found], settings)
        model = models.of(reference if settings.by == "expert" else plan.base)
        sampler = _run(model, sites, texts, settings, partial(progress, f"{name}, measuring"))
        writer.add(
            name,
            {key: second_moment(rows) for key, rows in sampler.rows.items() if _tokens(rows) >= FEWEST_TOKENS},
            model=str(reference),
            sources={site.target.name: sampler.source[site.module] for site in sites if site.module in sampler.source},
            weights=_weights(model, sites) if settings.by == "expert" else {},
            digest=digest,
        )
        del model, sampler  # which keep the model in memory
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
        tokens=writer.tokens,
    )


def _chosen(name: str, prompts: Sequence[Prompt], ids: Sequence[Sequence[int]], settings: Settings) -> list[Encoded]:
    """The tokens of some prompts, and which are sampled.

    Raises:
        PromptError: they are too few.
    """
    chosen = sample(prompts, ids, tokens=settings.tokens, seed=settings.seed)
    found = sum(len(prompt.positions) for prompt in chosen)
    if found < FEWEST_TOKENS:
        raise PromptError(
            f"{name}: its prompts must have at least {FEWEST_TOKENS} tokens in all; got {found} in {len(prompts)} "
            "prompts. Give more prompts, or longer ones"
        )
    return chosen


class _OneModel:
    """Models of a recipe, at most one in memory."""

    def __init__(self, plan: Plan, settings: Settings) -> None:
        self._plan = plan
        self._settings = settings
        self._reference: ModelReference | None = None
        self._model: nn.Module | None = None

    def of(self, reference: ModelReference) -> nn.Module:
        """A model, loaded unless it was the last one asked for."""
        if self._model is None or reference != self._reference:
            self._model = None  # not two at a time
            settings = self._settings
            self._model = load_model(
                reference, self._plan.options, dtype=settings.dtype, device=settings.device, offload=settings.offload
            )
            self._reference = reference
        return self._model


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


def _digest(settings: Settings, expert: str, sites: Sequence[Site], texts: Sequence[str]) -> str:
    """Of everything that the moments of one expert depend on."""
    parts = [settings.by, settings.dtype, expert, *texts]
    parts += [f"{site.module} {site.target}" for site in sites]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _generation_depends_on(expert: ModelReference, settings: Settings) -> list[str]:
    """The settings and the expert's own files; those of the base are in the sites."""
    parts = [f"{settings.self_prompts} {settings.seed} {settings.tokens}"]
    for path in filter(None, (expert.model, expert.lora)):
        folder = Path(path.path)
        if folder.is_dir():
            files = ((file, file_fingerprint(file)) for file in sorted(folder.iterdir()) if file.is_file())
            parts += [f"{file.name} {found.size} {found.digest}" for file, found in files]
        else:
            parts.append(str(path))
    return parts
