"""Which part of a merge one machine makes."""

from __future__ import annotations

from dataclasses import dataclass


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
