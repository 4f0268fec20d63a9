"""A part of a merge on disk.

A part folder holds `part.json`, the tensors of the part in `tensors/`, and in `files/` everything else that mergekit
writes for a model (configuration, tokenizer, card). No program takes it for a model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from mergekit.config import MergeConfiguration
from mergekit.io import ShardedTensorIndex
from mergekit.options import MergeOptions
from pydantic import BaseModel, ValidationError

import mergekit_ace
from mergekit_ace.output.selection import PlannedTensor

MANIFEST = "part.json"
TENSORS = "tensors"
FILES = "files"

_BLOCK = 1 << 22

# mergekit's options that change the output's values or names.
_TELLING_OPTIONS = ("allow_crimes", "lora_merge_dtype", "random_seed", "unsafe_truncate_embeddings")


class Merge(BaseModel, frozen=True, extra="forbid"):
    """What all parts of one merge have in common.

    Attributes:
        recipe: SHA-256 of the recipe's content and of the options that bear on it.
        plan: Names of all tensors of the output, in the order of the plan.
        shard_size: Bytes in an output file, as mergekit counts them.
        mergekit: Its version.
        mergekit_ace: Ours.
    """

    recipe: str
    plan: tuple[str, ...]
    shard_size: int
    mergekit: str
    mergekit_ace: str


class Manifest(BaseModel, frozen=True, extra="forbid"):
    """The content of `part.json`.

    Attributes:
        format: Version of this file's layout.
        name: The folder's name, which stands in the card.
        merge: What all parts have in common.
        tensors: Names that this part answers for.
        absent: Those of them that no input has, and so are not in the output.
        sha256: Digest of every file in `tensors/`.
    """

    format: Literal[1] = 1
    name: str
    merge: Merge
    tensors: tuple[str, ...]
    absent: tuple[str, ...]
    sha256: dict[str, str]


def describe_merge(recipe: MergeConfiguration, options: MergeOptions, plan: Sequence[PlannedTensor]) -> Merge:
    """Return what all parts of a recipe's merge have in common."""
    content = {
        "recipe": recipe.model_dump(mode="json"),
        "options": {name: getattr(options, name) for name in _TELLING_OPTIONS},
    }
    return Merge(
        recipe=hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest(),
        plan=tuple(tensor.name for tensor in plan),
        shard_size=options.out_shard_size,
        mergekit=version("mergekit"),
        mergekit_ace=mergekit_ace.__version__,
    )


def seal(folder: Path, merge: Merge, tensors: Sequence[PlannedTensor]) -> None:
    """Turn what mergekit has written for the given tensors into a part folder."""
    (folder / TENSORS).mkdir()
    (folder / FILES).mkdir()
    for entry in list(folder.iterdir()):
        if entry.name in (TENSORS, FILES):
            continue
        is_tensors = entry.name.startswith("model") and ".safetensors" in entry.suffixes
        entry.rename(folder / (TENSORS if is_tensors else FILES) / entry.name)
    written = tensor_files(folder) if tensors else {}
    names = tuple(tensor.name for tensor in tensors)
    manifest = Manifest(
        name=folder.name,
        merge=merge,
        tensors=names,
        absent=tuple(name for name in names if name not in written),
        sha256={path.name: digest(path) for path in sorted((folder / TENSORS).iterdir())},
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """Read a part folder's manifest.

    Raises:
        ValueError: There is none, or not one of this version.
    """
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise ValueError(
            f"part must be a folder written by a merge with --part or --only-tensors; got {folder}"
        ) from None
    except ValidationError as error:
        raise ValueError(f"part must have a readable {MANIFEST}; got {folder}: {error}") from None


def tensor_files(folder: Path) -> dict[str, Path]:
    """Return the file of every tensor that a part folder holds."""
    if not any((folder / TENSORS).iterdir()):
        return {}
    index = ShardedTensorIndex.from_disk(str(folder / TENSORS))
    return {name: folder / TENSORS / file for name, file in index.tensor_paths.items()}


def digest(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    result = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            result.update(block)
    return result.hexdigest()
