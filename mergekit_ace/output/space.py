"""Is there room for the output before hours are spent on it?"""

from __future__ import annotations

import errno
import shutil
from pathlib import Path


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
            f"free disk space must hold the output, about {_readable(nbytes)}; got {_readable(free)} at {existing}",
        )


def _readable(nbytes: int) -> str:
    size = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
