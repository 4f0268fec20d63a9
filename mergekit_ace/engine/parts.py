"""A part of a merge on disk.

A part folder holds `part.json`, the part's shards in `tensors/`, and in `files/` everything else that a model has
(configuration, tokenizer, card). No program takes it for a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationError

from mergekit_ace.checkpoints.fingerprint import file_digest
from mergekit_ace.engine.plan import MergePlan
from mergekit_ace.engine.receipt import Receipt, write_whole

MANIFEST = "part.json"
TENSORS = "tensors"
FILES = "files"
CARD_NAME = "merged model"
"""Stands in a part's card for the name that the joined model gets: the files of all parts are the same."""


class Manifest(BaseModel, frozen=True, extra="forbid"):
    """The content of `part.json`.

    Attributes:
        format: Version of this file's layout.
        plan: The merge that it is a part of, and the shards that it answers for.
        receipts: Of those shards.
        files: SHA-256 of every file in `files/`.
    """

    format: Literal[2] = 2
    plan: MergePlan
    receipts: tuple[Receipt, ...]
    files: dict[str, str]


def seal(folder: Path, plan: MergePlan, receipts: Sequence[Receipt]) -> None:
    """Write the manifest of a part folder whose shards and files are there.

    Args:
        folder: the part.
        plan: of the merge, with the part's shards only.
        receipts: of those shards.
    """
    others = folder / FILES
    manifest = Manifest(
        plan=plan,
        receipts=tuple(sorted(receipts, key=lambda receipt: receipt.file)),
        files={
            file.relative_to(others).as_posix(): file_digest(file)
            for file in sorted(others.rglob("*"))
            if file.is_file()
        },
    )
    write_whole(folder / MANIFEST, (manifest.model_dump_json(indent=2) + "\n").encode())


def read_manifest(folder: Path) -> Manifest:
    """Read a part folder's manifest.

    Raises:
        ValueError: There is none, or not one of this version, or one that was edited.
    """
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise ValueError(
            f"part must be a folder written by a merge with --part or --only-tensors; got {folder}"
        ) from None
    except ValidationError as error:
        raise ValueError(f"part must have a readable {MANIFEST}; got {folder}: {error}") from None
    for receipt in manifest.receipts:
        if not receipt.is_intact or Path(receipt.file).name != receipt.file:
            raise ValueError(f"part must have a {MANIFEST} as it was written; got {folder}, whose receipts were edited")
    return manifest
