"""Adapters of a language model that are merged by estimates, though their second moments could be measured."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mergekit.config import MergeConfiguration
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mergekit_ace.checkpoints.sources import read_json
from mergekit_ace.mergekit_internals import in_recipe_order
from mergekit_ace.methods.layerwise import LayerwiseMethod
from mergekit_ace.recipe.findings import Finding

_TEXTS = 32


def suggest_moments(
    file: Path, recipe: MergeConfiguration, method: LayerwiseMethod, parameters: Iterable[Mapping[str, Any]]
) -> Iterator[Finding]:
    """A hint where every expert is an adapter of a language model and no matrix has measured moments.

    Args:
        file: the recipe.
        recipe: as mergekit understands it.
        method: of the recipe.
        parameters: of each of its tensors, resolved.
    """
    experts = [model for model in in_recipe_order(recipe) if model != recipe.base_model]
    if len(experts) < 2 or any(expert.lora is None for expert in experts):
        return
    settings = list(parameters)
    if any(given.get("moments") for given in settings) or not any(map(method.takes_moments, settings)):
        return
    config = read_json(experts[0].model, "config.json") or {}
    if not {*(config.get("architectures") or ())} & {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}:
        return
    command = f"mergekit-ace moments {shlex.quote(str(file))}"
    yield Finding(
        level="hint",
        what="the experts are adapters of a language model, whose updates determine the second moments of their inputs "
        "hardly at all: measured ones keep more of every expert",
        remedy=f"With a few prompts of each expert's task: {command} --prompts NAME=FILE --out moments; without: "
        f"{command} --self-prompts {_TEXTS} --out moments. Then set moments: moments in its parameters.",
    )
