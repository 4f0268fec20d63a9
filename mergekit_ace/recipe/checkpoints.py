"""The models of a recipe as folders: files missing or cut short, configurations and vocabularies that differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from mergekit.common import ModelReference
from mergekit.io import ShardedTensorIndex
from mergekit.options import MergeOptions

from mergekit_ace.mergekit_internals import in_recipe_order
from mergekit_ace.recipe.failures import READING, message_of
from mergekit_ace.recipe.findings import Finding
from mergekit_ace.recipe.headers import read_headers
from mergekit_ace.recipe.plan import Recipe

# Configuration entries that make two models different functions of the same weights, or of none.
_SHAPES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
_MEANING = ("rope_theta", "rope_scaling", "rope_parameters", "hidden_act", "tie_word_embeddings")


def check_files(recipe: Recipe, options: MergeOptions) -> Iterator[Finding]:
    """Models that are not there, and files that are missing, truncated or no checkpoints."""
    for model in in_recipe_order(recipe.config):
        folder = Path(model.model.path)
        if folder.is_dir():
            yield from _check_folder(folder)
        elif _looks_local(model.model.path):
            yield Finding(
                level="error", what=f"the model {folder} must be a folder; there is none", remedy="Check its path."
            )
        else:
            yield Finding(
                level="hint",
                what=f"{model.model} is not on this disk; mergekit takes it from its cache or downloads it",
                remedy="Nothing to do, if it is the name of a model on the Hugging Face Hub.",
            )
        if model.lora is not None:
            yield from _check_adapter(model, options)


def check_configurations(recipe: Recipe, options: MergeOptions) -> Iterator[Finding]:
    """Experts whose configuration is not the base's."""
    models = in_recipe_order(recipe.config)
    configurations = {model: _configuration(model) for model in models}
    base = models[0]
    for expert in models[1:]:
        ours, theirs = configurations[base], configurations[expert]
        if ours is None or theirs is None:
            continue
        if ours.get("architectures") != theirs.get("architectures") and not options.allow_crimes:
            yield Finding(
                level="error",
                what=f"{expert} must be of the base's architecture {_named(ours)}; got {_named(theirs)}",
                remedy="Merge models of one architecture.",
            )
            continue
        shapes = _SHAPES if recipe.config.models else ()
        for key in shapes:
            if ours.get(key) != theirs.get(key):
                yield Finding(
                    level="error",
                    what=f"{expert} must have the base's {key} {ours.get(key)}; got {theirs.get(key)}",
                    remedy="Merge fine-tunes of one base model.",
                )
        for key in _MEANING:
            if ours.get(key) != theirs.get(key):
                yield Finding(
                    level="warning",
                    what=f"{expert} has {key} {theirs.get(key)} where the base has {ours.get(key)}: the merged model "
                    "keeps the base's",
                    remedy="Make sure that the expert is a fine-tune of this base.",
                )


def check_tokenizers(recipe: Recipe) -> Iterator[Finding]:
    """Experts whose tokens are numbered otherwise than the base's, in a recipe that aligns no vocabularies."""
    if recipe.config.tokenizer is not None or recipe.config.tokenizer_source is not None:
        return
    models = in_recipe_order(recipe.config)
    base = _vocabulary(Path(models[0].model.path))
    for expert in models[1:]:
        tokens = _vocabulary(Path((expert.lora or expert.model).path))
        if base is None or tokens is None or tokens == base:
            continue
        moved = sum(base[token] != number for token, number in tokens.items() if token in base)
        yield Finding(
            level="warning",
            what=f"{expert} has another tokenizer than the base: {len(tokens.keys() - base.keys())} tokens more, "
            f"{len(base.keys() - tokens.keys())} fewer, {moved} with another number; rows of different tokens would be "
            "merged",
            remedy="Align them: tokenizer: {source: base}, or {source: union} to keep every token.",
        )


def _check_folder(folder: Path) -> Iterator[Finding]:
    if not (folder / "config.json").is_file():
        yield Finding(
            level="error", what=f"{folder} must hold config.json; it does not", remedy="Complete the checkpoint."
        )
    try:
        read_headers(ShardedTensorIndex.from_disk(str(folder)))
    except UnpicklingError:
        yield Finding(
            level="error",
            what=f"{folder} must hold whole pickles of tensors; one is damaged or holds more, which was not run",
            remedy="Take the model as safetensors, from somebody whom you trust.",
        )
    except READING as error:
        yield Finding(
            level="error",
            what=f"{folder} cannot be read: {message_of(error)}",
            remedy="Download or copy it again; a file may be missing or cut short.",
        )


def _check_adapter(model: ModelReference, options: MergeOptions) -> Iterator[Finding]:
    assert model.lora is not None
    if not options.lora_merge_cache:
        yield Finding(
            level="error",
            what=f"the adapter of {model} must be merged before it can be read, and there is no folder for that",
            remedy="Add --lora-merge-cache FOLDER to the command.",
        )
    folder = Path(model.lora.path)
    if _looks_local(model.lora.path) and not folder.is_dir():
        yield Finding(
            level="error", what=f"the adapter {folder} must be a folder; there is none", remedy="Check its path."
        )
    trained_on = (_json(folder / "adapter_config.json") or {}).get("base_model_name_or_path")
    if trained_on and Path(trained_on).name != Path(model.model.path).name:
        yield Finding(
            level="warning",
            what=f"the adapter {folder} was trained on {trained_on}, but is put on {model.model}",
            remedy=f"Write {trained_on}+{folder}, unless both are the same model.",
        )
    if options.lora_merge_dtype != "float32":
        yield Finding(
            level="hint",
            what=f"the update of {model} is rounded to {options.lora_merge_dtype or 'the dtype of its base'} when its "
            "adapter is merged",
            remedy="--lora-merge-dtype float32 keeps it, and keeps it of low rank.",
        )


def _looks_local(path: str) -> bool:
    """A Hub name is `name` or `owner/name`; all else can only be a path."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1


def _named(configuration: Mapping[str, Any]) -> str:
    return ", ".join(configuration.get("architectures") or ["without a name"])


def _configuration(model: ModelReference) -> Mapping[str, Any] | None:
    return _json(Path(model.model.path) / "config.json")


def _vocabulary(folder: Path) -> Mapping[str, int] | None:
    document = _json(folder / "tokenizer.json")
    if document is None:
        return None
    listed = document.get("model", {}).get("vocab", {})
    # WordPiece and BPE map tokens to numbers; Unigram lists pairs of token and score.
    tokens = dict(listed) if isinstance(listed, Mapping) else {pair[0]: index for index, pair in enumerate(listed)}
    return tokens | {token["content"]: token["id"] for token in document.get("added_tokens", [])}


def _json(file: Path) -> Mapping[str, Any] | None:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return document if isinstance(document, Mapping) else None
