"""The record of a finished model: `mergekit-ace.json`, beside its weights.

It depends on the merge alone: not on when, where or in how many pieces it was made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from mergekit_ace.checkpoints.fingerprint import Fingerprint, file_digest
from mergekit_ace.engine.plan import Merge
from mergekit_ace.engine.receipt import write_whole

RECORD = "mergekit-ace.json"


class InputFile(BaseModel, frozen=True, extra="forbid"):
    """A file that was read: its size, and the digest of a `Fingerprint`."""

    size: int
    digest: str


class Record(BaseModel, frozen=True, extra="forbid"):
    """The content of `mergekit-ace.json`."""

    format: Literal[1] = 1
    recipe: str
    """SHA-256 of the recipe's content and of the options that bear on it."""
    mergekit: str
    mergekit_ace: str
    torch: str
    tokenizer: str
    inputs: dict[str, InputFile]
    files: dict[str, str]
    """SHA-256 of every other file of the folder."""


def write_record(merge: Merge, inputs: dict[str, Fingerprint], weights: dict[str, str], folder: Path) -> None:
    """Write the record of a folder that is complete.

    Args:
        merge: what was made.
        inputs: of what.
        weights: SHA-256 of the files whose digest is known.
        folder: the model.
    """
    others = {
        file.relative_to(folder).as_posix(): file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != RECORD
    }
    record = Record(
        recipe=merge.recipe,
        mergekit=merge.mergekit,
        mergekit_ace=merge.mergekit_ace,
        torch=merge.torch,
        tokenizer=merge.tokenizer,
        inputs={key: InputFile(size=found.size, digest=found.digest) for key, found in sorted(inputs.items())},
        files={name: weights.get(name) or file_digest(file) for name, file in others.items()},
    )
    write_whole(folder / RECORD, (record.model_dump_json(indent=2) + "\n").encode())
