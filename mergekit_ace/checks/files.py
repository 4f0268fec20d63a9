"""The models of a recipe as files: missing, cut short, damaged, or pointers to what was not fetched."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from mergekit.common import ModelPath, ModelReference

from mergekit_ace.checkpoints.adapter_folders import ADAPTER_FILES, base_of_adapter
from mergekit_ace.checkpoints.headers import read_file, read_folder
from mergekit_ace.checkpoints.hub import hub_model
from mergekit_ace.checkpoints.sources import looks_local
from mergekit_ace.git_lfs import pointer_words
from mergekit_ace.mergekit_internals import in_recipe_order
from mergekit_ace.recipe.failures import READING, message_of
from mergekit_ace.recipe.findings import Finding
from mergekit_ace.recipe.reading import Recipe

# What a merge reads beside weights, and copies into its output unread.
_SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
_FETCH_AGAIN = "Download or copy it again; a file may be missing or cut short."


def check_files(recipe: Recipe) -> Iterator[Finding]:
    """Models and adapters that are not there, and files of theirs that are damaged, each with its model's name."""
    seen: set[ModelPath] = set()
    for model in in_recipe_order(recipe.config):
        if model.model not in seen:
            seen.add(model.model)
            yield from _check_model(model, Path(recipe.name).parent)
        if model.lora is not None and model.lora not in seen:
            seen.add(model.lora)
            yield from _check_adapter(model)
    source = _tokenizer_source(recipe)
    if source is not None and source not in seen:
        yield from _check_tokenizer(source, Path(recipe.name).parent)


def check_file_of_tensors(file: Path) -> Iterator[Finding]:
    """One file of tensors, as mergekit-pytorch takes it."""
    if not file.is_file():
        yield Finding(level="error", what=f"the model {file} must be a file; there is none", remedy="Check its path.")
        return
    try:
        read_file(file)
    except READING as error:
        yield Finding(level="error", what=message_of(error), remedy=_FETCH_AGAIN)


def _check_model(model: ModelReference, beside: Path) -> Iterator[Finding]:
    folder = Path(model.model.path)
    if folder.is_dir():
        yield from _check_folder(folder)
    elif folder.exists():
        yield Finding(
            level="error",
            what=f"the model {folder} must be a folder; it is a file",
            remedy="Name the folder of a model, or run mergekit-pytorch, which takes single files.",
        )
    elif looks_local(model.model.path):
        yield Finding(
            level="error",
            what=f"the model {folder} must be a folder; there is none",
            remedy=_elsewhere(folder, beside) or "Check its path.",
        )
    else:
        yield from _check_hub(model.model, beside)


def _elsewhere(path: Path, beside: Path) -> str | None:
    """The folder that is probably meant: from the home, or from the place of the recipe."""
    if path.parts[:1] == ("~",) and path.expanduser().exists():
        return f"mergekit does not read ~ as the home; write {path.expanduser()}."
    if not path.is_absolute() and (beside / path).exists():
        return f"mergekit starts from the folder in which it runs; write {(beside / path).resolve()}."
    return None


def _tokenizer_source(recipe: Recipe) -> ModelPath | None:
    """The model that a recipe takes its tokenizer from by name; None for base, union or no entry."""
    config = recipe.config
    source = config.tokenizer.source if config.tokenizer is not None else config.tokenizer_source
    return source.model if isinstance(source, ModelReference) else None


def _check_tokenizer(source: ModelPath, beside: Path) -> Iterator[Finding]:
    folder = Path(source.path)
    if looks_local(source.path) and not folder.is_dir():
        yield Finding(
            level="error",
            what=f"the tokenizer's source {folder} must be a folder; there is none",
            remedy=_elsewhere(folder, beside) or "Check its path, or write base or union.",
        )
    elif not folder.exists() and hub_model(source).state in ("absent", "unreachable"):
        yield from _check_hub(source, beside)


def _check_hub(source: ModelPath, beside: Path) -> Iterator[Finding]:
    told = hub_model(source)
    if told.state in ("absent", "unreachable") and (remedy := _elsewhere(Path(source.path), beside)) is not None:
        yield Finding(
            level="error",
            what=f"{source} is no folder in {Path.cwd()}, and the Hugging Face Hub does not show it",
            remedy=remedy,
        )
    elif told.state == "absent":
        yield Finding(
            level="error",
            what=f"{source} is no folder on this disk, and the Hugging Face Hub does not show it: {told.words}",
            remedy="Check its name and revision; for a private or gated model run hf auth login.",
        )
    elif told.state == "no safetensors":
        yield Finding(
            level="hint",
            what=f"{source} has no safetensors files on the Hugging Face Hub: its tensors were not checked",
            remedy="Nothing to do; mergekit downloads its pickles. Check again once they are on this disk.",
        )
    elif told.state == "unreachable":
        yield Finding(
            level="hint",
            what=f"{source} is not on this disk, and the Hugging Face Hub cannot be asked ({told.words}): "
            "it was not checked",
            remedy="Nothing to do, if it is a model's name there and the merge has a network.",
        )


def _check_folder(folder: Path) -> Iterator[Finding]:
    configuration = folder / "config.json"
    if (base := base_of_adapter(folder)) is not None:
        yield Finding(
            level="error",
            what=f"{folder} is an adapter, and the recipe takes it for a model",
            remedy=f"Write {base}+{folder}; with --adapter the result is an adapter too.",
        )
        return
    if not configuration.is_file():
        yield Finding(
            level="error", what=f"{folder} must hold config.json; it does not", remedy="Complete the checkpoint."
        )
    for name in _SMALL_FILES:
        if (words := pointer_words(folder / name)) is not None:
            yield Finding(level="error", what=f"{folder}: {folder / name} is no {name}; {words}", remedy=_FETCH_AGAIN)
        elif name.endswith(".json") and (folder / name).is_file():
            yield from _check_json(folder, folder / name)
    yield from _check_choice(folder)
    try:
        read_folder(folder)
    except READING as error:
        others = "" if "Unable to find model files" not in str(error) else _other_weights(folder)
        yield Finding(level="error", what=f"{folder} cannot be read: {message_of(error)}{others}", remedy=_FETCH_AGAIN)


def _check_choice(folder: Path) -> Iterator[Finding]:
    """Weights as one file beside an index of others: two programs load two models from such a folder."""
    file, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not (file.is_file() and index.is_file()):
        return
    try:
        listed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # reported where it is read
        return
    if listed != {file.name}:
        yield Finding(
            level="warning",
            what=f"{folder} holds {file.name} and an index of {len(listed)} other files: mergekit merges those of the "
            f"index, and transformers loads {file.name}",
            remedy="Remove what is left over from an earlier save: the one file, or the index and its files.",
        )


def _check_json(folder: Path, file: Path) -> Iterator[Finding]:
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        yield Finding(
            # mergekit takes an expert's tokenizer for the base's where it cannot read it.
            level="error" if file.name == "config.json" else "warning",
            what=f"{folder}: {file} must be JSON; {message_of(error)}",
            remedy="Copy it again.",
        )


def _other_weights(folder: Path) -> str:
    """What a folder without the names that mergekit knows has in their place."""
    files = sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.suffix in (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".h5", ".msgpack", ".ckpt")
    )
    if not files:
        return ""
    broken = next((folder / name for name in files if not (folder / name).exists()), None)
    if broken is not None:
        return f"; {broken} is a link to {broken.readlink()}, which is not there"
    return (
        f"; it holds {', '.join(files[:3])}, and mergekit reads model.safetensors, pytorch_model.bin, or shards with "
        "an index of those names"
    )


def _check_adapter(model: ModelReference) -> Iterator[Finding]:
    assert model.lora is not None
    folder = Path(model.lora.path)
    if not folder.is_dir():
        if looks_local(model.lora.path) or folder.exists():
            yield Finding(
                level="error",
                what=f"the adapter {folder} of {model} must be a folder; there is none",
                remedy="Check its path.",
            )
        return
    files = [folder / name for name in ADAPTER_FILES if (folder / name).is_file()]
    if not (folder / "adapter_config.json").is_file() or not files:
        lacking = "adapter_config.json" if files else " or ".join(ADAPTER_FILES)
        yield Finding(
            level="error",
            what=f"the adapter {folder} of {model} must hold {lacking}; it does not",
            remedy="Name the folder that save_pretrained of peft has written.",
        )
    if (words := pointer_words(folder / "adapter_config.json")) is not None:
        yield Finding(
            level="error",
            what=f"{model}: {folder / 'adapter_config.json'} is no configuration; {words}",
            remedy=_FETCH_AGAIN,
        )
    for file in files[:1]:
        try:
            read_file(file)
        except READING as error:
            yield Finding(level="error", what=f"{model}: {message_of(error)}", remedy=_FETCH_AGAIN)
