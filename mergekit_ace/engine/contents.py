"""What a file of tensors holds, by its header."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from mergekit_ace.checkpoints.headers import read_file
from mergekit_ace.engine.shards import OutputTensor

_SHOWN = 5


def contents(file: Path) -> dict[str, OutputTensor]:
    """Name, dtype and shape of every tensor of a file.

    Raises:
        OSError, RuntimeError: it is missing, truncated or no file of tensors; the message names it.
    """
    return {
        name: OutputTensor(name=name, dtype=str(header.dtype).removeprefix("torch."), shape=header.shape)
        for name, header in read_file(file).items()
    }


def require_each_once(planned: Sequence[OutputTensor], files: Iterable[Path], absent: Iterable[str] = ()) -> None:
    """Raise unless every planned tensor is in one of the files, once, and as planned; and nothing else is.

    Raises:
        ValueError: naming what is missing, repeated, unknown or different.
        OSError, RuntimeError: as `contents`.
    """
    left_out = set(absent)
    expected = {tensor.name: tensor for tensor in planned if tensor.name not in left_out}
    counts: Counter[str] = Counter()
    different = []
    for file in files:
        found = contents(file)
        counts.update(found.keys())
        different += [name for name, tensor in found.items() if name in expected and tensor != expected[name]]
    require_none("every planned tensor must be in the output", "missing", [n for n in expected if not counts[n]])
    require_none("every tensor must be in one file only", "repeated", [n for n in counts if counts[n] > 1])
    require_none("the output must hold planned tensors only", "unknown", [n for n in counts if n not in expected])
    require_none("every tensor must have the planned shape and dtype", "different", different)


def require_none(requirement: str, what: str, names: Sequence[str]) -> None:
    """Raise a `ValueError` that lists the names, unless there is none."""
    if names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise ValueError(f"{requirement}; got {what} {', '.join(sorted(names)[:_SHOWN])}{more}")
