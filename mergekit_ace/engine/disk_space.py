"""Whether the output fits on the disk, before hours are spent on it."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from rich.filesize import decimal


def require_space(folder: Path, nbytes: int) -> None:
    """Raise unless the file system of a folder, which need not exist yet, has `nbytes` bytes free.

    Raises:
        OSError: With `ENOSPC`, naming both sizes.
    """
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if nbytes > free:
        raise OSError(
            errno.ENOSPC,
            f"free disk space must hold the output, about {decimal(nbytes)}; got {decimal(free)} at {existing}",
        )
