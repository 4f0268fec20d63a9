"""Which tensors of a merge one run makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True, kw_only=True)
class PlannedTensor:
    """One tensor of the output: its name, and its size as far as the inputs' headers tell."""

    name: str
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Part:
    """The `index`-th of `count` parts of a merge, counted from 1.

    Raises:
        ValueError: Not `1 <= index <= count`.
    """

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.count:
            raise ValueError(f"part must be I/N with 1 <= I <= N; got {self.index}/{self.count}")

    @classmethod
    def parse(cls, text: str) -> Part:
        """Read `I/N`.

        Raises:
            ValueError: The text is not of this form, or out of range.
        """
        index, slash, count = text.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal()):
            raise ValueError(f"part must be I/N, as in 2/8; got {text!r}")
        return cls(index=int(index), count=int(count))


def select(
    tensors: Sequence[PlannedTensor], patterns: Sequence[str] = (), part: Part | None = None
) -> list[PlannedTensor]:
    """Return the tensors that match any of the patterns (all, if there is none), and of those one part.

    A part is a run of neighbours in the order of the plan, so that one machine reads few of the inputs' files. The
    parts' sizes differ from the mean by no more than the largest tensor, and depend on nothing but the list.

    Raises:
        ValueError: A pattern matches no tensor.
    """
    for pattern in patterns:
        if not any(fnmatchcase(tensor.name, pattern) for tensor in tensors):
            raise ValueError(
                f"tensor pattern must match a tensor of the output; got {pattern!r}, which matches none of "
                f"{len(tensors)}, such as {tensors[0].name if tensors else 'none'}"
            )
    if patterns:
        tensors = [tensor for tensor in tensors if any(fnmatchcase(tensor.name, pattern) for pattern in patterns)]
    if part is None:
        return list(tensors)
    # A tensor belongs to the part in which its middle lies, on a scale of bytes. Twice the middle, for whole numbers.
    sizes = [max(tensor.nbytes, 1) for tensor in tensors]
    total = sum(sizes)
    chosen, start = [], 0
    for tensor, size in zip(tensors, sizes, strict=True):
        middle = 2 * start + size
        start += size
        if middle * part.count // (2 * total) == part.index - 1:
            chosen.append(tensor)
    return chosen
