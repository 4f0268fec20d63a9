"""The proof that a shard was made: of what, by whom, and what must be found in its file."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationError

from mergekit_ace.checkpoints.fingerprint import Fingerprint
from mergekit_ace.engine.shards import OutputTensor


class Notice(BaseModel, frozen=True, extra="forbid"):
    """A warning that was given while a shard was made."""

    cause: str
    """Warnings of one cause are shown once for a whole merge."""
    text: str


class Maker(BaseModel, frozen=True, extra="forbid"):
    """Where a shard was made. Makers that differ in more than the host may round differently."""

    host: str
    processor: str
    """Instruction set and threads of a CPU, or the name of a GPU."""


class Receipt(BaseModel, frozen=True, extra="forbid"):
    """One shard that was made."""

    format: Literal[1] = 1
    key: str
    """`MergePlan.key` of the shard."""
    file: str
    tensors: tuple[OutputTensor, ...]
    """What the file holds."""
    absent: tuple[str, ...]
    """Planned optional tensors that too few models have."""
    sha256: str
    """Of the file; empty if it holds nothing and is not there."""
    changed: int
    """When the file was written, in nanoseconds; 0 if it is not there."""
    inputs: dict[str, Fingerprint]
    """The files that it was made from, as they were."""
    seconds: float
    reading: float
    """Seconds of these that the worker waited for inputs."""
    writing: float
    """Seconds of these that it waited for what was merged before to be written."""
    warnings: tuple[Notice, ...]
    maker: Maker
    seal: str = ""
    """SHA-256 of all of the above, by which a receipt that was edited or cut short is found."""

    def sealed(self) -> Receipt:
        """The receipt with its seal."""
        return self.model_copy(update={"seal": self._digest()})

    @property
    def is_intact(self) -> bool:
        """Whether it is as it was sealed."""
        return self.seal == self._digest()

    def _digest(self) -> str:
        content = self.model_dump(mode="json", exclude={"seal"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_receipt(receipt: Receipt, folder: Path) -> None:
    """Leave a receipt, whole or not at all."""
    write_whole(folder / f"{receipt.file}.json", receipt.model_dump_json(indent=2).encode())


def read_receipts(folder: Path) -> dict[str, Receipt]:
    """Every intact receipt of a folder, by the file that it stands for; others are passed over."""
    found: dict[str, Receipt] = {}
    for file in sorted(folder.glob("*.json")):
        try:
            receipt = Receipt.model_validate_json(file.read_bytes())
        except (OSError, ValidationError):
            continue
        if receipt.is_intact and file.name == f"{receipt.file}.json":
            found[receipt.file] = receipt
    return found


def write_whole(file: Path, content: bytes) -> None:
    """Write a file that is there in whole or not at all, also after a power cut."""
    partial = temporary_name(file)
    try:
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def temporary_name(file: Path) -> Path:
    """A name beside a file that no other process uses; it begins with a dot and ends in `.part`."""
    return file.with_name(f".{file.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.part")


def remove_unfinished(folder: Path) -> None:
    """Remove what workers that were killed have left under temporary names."""
    for file in folder.glob(".*.part"):
        file.unlink(missing_ok=True)
