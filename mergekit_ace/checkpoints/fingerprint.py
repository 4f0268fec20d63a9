"""Which version of a file was read, told without reading all of it.

A checkpoint is too large to be hashed before every merge. Its header and 64 blocks spread over it tell a retrained
model from its predecessor, which has the same names, shapes and size.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from pydantic import BaseModel

_READ = 1 << 22
_BLOCK = 4096
_BLOCKS = 64
_WHOLE = 1 << 20
_HEADER = 8
_LONGEST_HEADER = 100_000_000


class Fingerprint(BaseModel, frozen=True, extra="forbid"):
    """One version of one file.

    Attributes:
        size: In bytes.
        digest: SHA-256 of the size, a safetensors file's header, and 64 blocks of 4 kB; of all of a file below 1 MB.
        changed: Time of its last change in nanoseconds. Another copy of the file has another one.
    """

    size: int
    digest: str
    changed: int

    def is_copy_of(self, other: Fingerprint) -> bool:
        """Whether both files hold the same, as far as a fingerprint tells."""
        return (self.size, self.digest) == (other.size, other.digest)


def fingerprint(file: Path) -> Fingerprint:
    """Read a file's fingerprint.

    Raises:
        OSError: it cannot be read.
    """
    found = file.stat()
    digest = hashlib.sha256(found.st_size.to_bytes(8, "little"))
    with file.open("rb") as stream:
        if found.st_size <= _WHOLE:
            digest.update(stream.read())
        else:
            if file.suffix == ".safetensors":
                length = int.from_bytes(stream.read(_HEADER), "little")
                digest.update(stream.read(min(length, _LONGEST_HEADER)))
            for place in range(_BLOCKS):
                stream.seek((found.st_size - _BLOCK) * place // (_BLOCKS - 1))
                digest.update(stream.read(_BLOCK))
    return Fingerprint(size=found.st_size, digest=digest.hexdigest(), changed=found.st_mtime_ns)


def describing_files(folder: Path) -> list[Path]:
    """A model's small files that a merge may depend on: configuration, tokenizer, templates."""
    suffixes = (".json", ".model", ".txt", ".jinja")
    return sorted(
        file
        for file in folder.iterdir()
        if file.suffix in suffixes and file.is_file() and not file.name.endswith(".index.json")
    )


def file_digest(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    result = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_READ):
            result.update(block)
    return result.hexdigest()
