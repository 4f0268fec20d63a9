"""Git LFS pointers: what a clone without git-lfs, or a web page's download, leaves in place of a large file."""

from __future__ import annotations

import re
from pathlib import Path

_HEAD = b"version https://git-lfs.github.com/spec/"
_LARGEST = 1024  # by the specification
_SIZE = re.compile(rb"^size (\d+)$", re.MULTILINE)


def pointer_words(file: Path) -> str | None:
    """What a pointer is and how the file itself is had, to end a sentence about `file`; None where it is no pointer."""
    try:
        if not file.is_file() or file.stat().st_size > _LARGEST:
            return None
        text = file.read_bytes()
    except OSError:
        return None
    if not text.startswith(_HEAD):
        return None
    size = _SIZE.search(text)
    stands_for = f" of {int(size[1]):,} bytes" if size else ""
    return (
        f"it is a Git LFS pointer: a text of {len(text)} bytes that stands for the file{stands_for}, which was not "
        "fetched. Run git lfs install and git lfs pull in its folder, or fetch it with hf download"
    )
