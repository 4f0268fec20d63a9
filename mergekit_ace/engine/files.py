"""Everything of a merged model that is not its weights: configuration, tokenizer, card, index."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
import yaml
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from transformers import PreTrainedConfig

from mergekit_ace.engine.shards import OutputTensor
from mergekit_ace.mergekit_internals import (
    CARD_TEMPLATE,
    copy_tagalong_files,
    copy_tokenizer,
    in_recipe_order,
    method_md,
    set_chat_template,
    update_config_vocab,
)
from mergekit_ace.recipe.adapter_cache import adapter_folder
from mergekit_ace.recipe.failures import message_of
from mergekit_ace.recipe.plan import Plan

LOG = logging.getLogger("mergekit_ace")

CARD = "README.md"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def write_files(plan: Plan, source: str, folder: Path, name: str) -> None:
    """Write configuration, card and tokenizer as `mergekit-yaml` does, without asking a network for anything.

    Args:
        plan: the recipe's.
        source: its text, for the card.
        folder: where to.
        name: the model's name in the card.

    Raises:
        RuntimeError: the tokenizer cannot be copied, or the chat template is none.
    """
    recipe, options = plan.recipe.config.model_copy(deep=True), plan.options
    config = plan.out_config
    tokenizer = None if plan.tokenizer is None else plan.tokenizer.tokenizer
    if tokenizer is not None:
        multiple = recipe.tokenizer.pad_to_multiple_of if recipe.tokenizer else None
        update_config_vocab(config, plan.architecture, tokenizer, pad_to_multiple_of=multiple)
    _name_the_stored_dtype(config, plan)
    config.save_pretrained(folder)
    if options.write_model_card:
        (folder / CARD).write_text(card(recipe, source, name), encoding="utf-8")
        (folder / "mergekit_config.yml").write_text(source, encoding="utf-8")
    if plan.base is not None and plan.base.lora is not None:
        # Where mergekit will look for the merged base.
        options = options.model_copy(update={"lora_merge_cache": str(adapter_folder(plan.base, options))})
    if tokenizer is not None:
        set_chat_template(tokenizer, recipe)
        tokenizer.save_pretrained(folder)
    elif options.copy_tokenizer:
        donor = plan.models[0]
        try:
            copy_tokenizer(recipe, str(folder), options=options)
        except Exception as error:  # transformers and tokenizers each raise their own
            if recipe.chat_template and not _has_tokenizer(plan, donor):
                raise RuntimeError(
                    f"{donor} has no tokenizer, with which chat_template is saved. Copy one into its folder, add "
                    "tokenizer_source: EXPERT, or remove chat_template"
                ) from error
            if _has_tokenizer(plan, donor):
                raise RuntimeError(
                    f"the tokenizer of {donor} cannot be copied: {message_of(error)}. "
                    "Repair it, or pass --no-copy-tokenizer"
                ) from error
            LOG.warning("%s has no tokenizer, so the merged model has none. Copy one from where it was trained.", donor)
    elif recipe.chat_template:
        LOG.warning("The chat template is not saved: there is no tokenizer to save it with.")
    copy_tagalong_files(recipe, str(folder), files=plan.architecture.tagalong_files or [], options=options)


def _name_the_stored_dtype(config: PreTrainedConfig, plan: Plan) -> None:
    """Have a configuration name the dtype of most of the weights: transformers converts to what it names.

    mergekit takes over the base's where the recipe names none, whatever the tensors are stored in.
    """
    named = str(getattr(config, "dtype", None) or "").removeprefix("torch.")
    sizes: Counter[torch.dtype] = Counter()
    for tensor in plan.tensors:
        if tensor.output is not None and tensor.output.dtype.is_floating_point:
            sizes[tensor.output.dtype] += tensor.output.bytes
    if not named or not sizes or (stored := str(sizes.most_common(1)[0][0]).removeprefix("torch.")) == named:
        return
    LOG.warning(
        "The base's config.json names %s and the merged weights are %s, which the merged model's names. Set "
        "out_dtype for others.",
        named,
        stored,
    )
    config.dtype = stored


def _has_tokenizer(plan: Plan, model: ModelReference) -> bool:
    return any((plan.folder(model) / name).exists() for name in _TOKENIZER_FILES)


def card(recipe: MergeConfiguration, source: str, name: str) -> str:
    """The card that mergekit writes, with the models in the order of the recipe.

    mergekit asks the hub whether it knows a relative path; here a path that is on this disk is none of the hub's.
    """
    models = in_recipe_order(recipe)
    base = None if recipe.merge_method == "slerp" else recipe.base_model
    paths = [path.path for model in models for path in (model.model, model.lora) if path is not None]
    metadata = {
        "base_model": [path for path in paths if _on_hub(path)],
        "tags": ["mergekit", "merge"],
        "library_name": "transformers",
    }
    return CARD_TEMPLATE.format(
        metadata=yaml.dump(metadata),
        model_list="\n".join(f"* {_linked(model)}" for model in models if model != base),
        base_text=f" using {_linked(base)} as a base" if base else "",
        merge_method=method_md(recipe.merge_method),
        name=name,
        config_yaml=source,
    )


def retitled(text: str, old: str, new: str) -> str:
    """A card under another name."""
    return text.replace(f"\n# {old}\n", f"\n# {new}\n", 1)


def _linked(model: ModelReference) -> str:
    paths = [path.path for path in (model.model, model.lora) if path is not None]
    return " + ".join(f"[{path}](https://huggingface.co/{path})" if _on_hub(path) else path for path in paths)


def _on_hub(path: str) -> bool:
    return path[0] not in "/~" and path.count("/") <= 1 and not os.path.exists(path)


def write_index(
    weights: Mapping[str, OutputTensor], files: Mapping[str, str], folder: Path, *, safetensors: bool
) -> None:
    """Write the index that transformers and mergekit read where a model has several files.

    Args:
        weights: the model's tensors, in the order of its files.
        files: the file of each.
        folder: where to.
        safetensors: or pickles.
    """
    from importlib.metadata import version

    content = {
        "metadata": {
            "total_size": sum(weight.nbytes for weight in weights.values()),
            "mergekit_version": version("mergekit"),
        },
        "weight_map": {name: files[name] for name in weights},
    }
    name = "model.safetensors.index.json" if safetensors else "pytorch_model.bin.index.json"
    (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
