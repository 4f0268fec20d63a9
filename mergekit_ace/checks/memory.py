"""The memory that programs can still get: of the machine, and of the control group that a scheduler put them into."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class _Names:
    """Files of a control group, and what its statistics call pages of files, which are given back at need."""

    limit: str
    usage: str
    files: tuple[str, ...]


_VERSIONS = {
    1: _Names(
        limit="memory.limit_in_bytes",
        usage="memory.usage_in_bytes",
        files=("total_inactive_file", "total_active_file"),
    ),
    2: _Names(limit="memory.max", usage="memory.current", files=("inactive_file", "active_file")),
}


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that programs can get here: what is free, and what files in memory release; None: unknown.

    Args:
        root: where `proc` and `sys` are.
    """
    lines = _lines(root / "proc" / "meminfo")
    kilobytes = next((int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
    if kilobytes is None:
        return None
    return min([1024 * kilobytes, *_left_in_groups(root)])


def _left_in_groups(root: Path) -> Iterator[int]:
    """What each control group of this process, from its own to the outermost, lets it have."""
    mounted = root / "sys" / "fs" / "cgroup"
    for line in _lines(root / "proc" / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            names, top = _VERSIONS[2], mounted
        elif "memory" in controllers.split(","):
            names, top = _VERSIONS[1], mounted / "memory"
        else:
            continue
        group = top / path.strip("/")
        # A container may see its own group as the outermost, and not under the path that the machine knows it by.
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(top))):
            limit, usage = _number(folder / names.limit), _number(folder / names.usage)
            if limit is not None and usage is not None:
                statistics = dict(pair.split(" ", 1) for pair in _lines(folder / "memory.stat"))
                yield max(0, limit - usage + sum(int(statistics.get(name, 0)) for name in names.files))


def _number(file: Path) -> int | None:
    """None where there is no file, or no limit, which is called `max`."""
    text = "".join(_lines(file))
    return int(text) if text.isdecimal() else None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
