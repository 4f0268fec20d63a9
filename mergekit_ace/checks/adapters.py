"""The LoRA experts of a recipe: where they are merged, and what they were trained on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference
from mergekit.options import MergeOptions

from mergekit_ace.checkpoints.sources import read_json
from mergekit_ace.checks.adapter_fit import check_fit
from mergekit_ace.factors.formats.peft_settings import unknown_settings
from mergekit_ace.mergekit_internals import in_recipe_order
from mergekit_ace.recipe.findings import Finding
from mergekit_ace.recipe.reading import Recipe

# Adapters trained on a quantized base name it; they are put on the base that it was quantized from.
_QUANTIZED_NAME = re.compile(r"(?:^|[-_.])(?:bnb|4-?bit|8-?bit|int4|int8|nf4|fp4|fp8|gptq|awq|q4|q8)(?:[-_.]|$)", re.I)


def check_adapters(recipe: Recipe, options: MergeOptions) -> Iterator[Finding]:
    """Settings that adapters need, and bases that they were not trained on."""
    adapted = [model for model in in_recipe_order(recipe.config) if model.lora is not None]
    if adapted:
        yield from _check_settings(adapted, options)
    for model in adapted:
        yield from _check_base(model)
        if model.lora is not None:
            yield from check_known(str(model.lora), read_json(model.lora, "adapter_config.json") or {})
        yield from check_fit(model, options)


def _check_settings(adapted: Sequence[ModelReference], options: MergeOptions) -> Iterator[Finding]:
    names = ", ".join(map(str, adapted))
    if not options.lora_merge_cache:
        yield Finding(
            level="error",
            what="mergekit reads an adapter from a copy of its base that has the adapter merged in, and there is no "
            f"folder for these copies: {names}",
            remedy="Add --lora-merge-cache FOLDER, on a disk with space for one base each; or --adapter, which makes "
            "one adapter and no copies.",
        )
    if options.lora_merge_dtype != "float32":
        yield Finding(
            level="hint",
            what=f"the updates are rounded to {options.lora_merge_dtype or 'the dtype of the base'} when the adapters "
            f"are merged into copies of it: {names}",
            remedy="--lora-merge-dtype float32 keeps them, and keeps them of low rank; a copy takes 4 bytes a weight.",
        )


def check_known(adapter: str, settings: Mapping[str, Any]) -> Iterator[Finding]:
    """Settings of an adapter's configuration that the installed peft does not know."""
    if unknown := unknown_settings(settings):
        yield Finding(
            level="warning",
            what=f"the configuration of the adapter {adapter} has settings that the installed peft does not know: "
            f"{', '.join(unknown)}; they have no part in the merge",
            remedy="Install the version of peft that wrote it, or make sure that they do not change the update.",
        )


def _check_base(model: ModelReference) -> Iterator[Finding]:
    assert model.lora is not None
    trained_on = (read_json(model.lora, "adapter_config.json") or {}).get("base_model_name_or_path")
    if not trained_on or Path(trained_on).name == Path(model.model.path).name:
        return
    if _QUANTIZED_NAME.search(Path(trained_on).name):
        yield Finding(
            level="hint",
            what=f"the adapter {model.lora} was trained on {trained_on}, by its name a quantized model, and is put on "
            f"{model.model}",
            remedy="Nothing to do, if that is the model that it was quantized from.",
        )
        return
    yield Finding(
        level="warning",
        what=f"the adapter {model.lora} was trained on {trained_on}, but is put on {model.model}",
        remedy=f"Write {trained_on}+{model.lora}, unless both are the same model.",
    )
