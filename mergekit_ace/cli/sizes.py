"""Sizes on a command line."""

from __future__ import annotations

from typing import Any

import click
from mergekit.options import ShardSizeParamType


class ShardSize(ShardSizeParamType):
    """mergekit's number of bytes: K, M and B are thousands, millions and billions. mergekit ends in a traceback."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number of bytes; a usage error for what mergekit cannot read."""
        try:
            size = int(super().convert(value, param, ctx))
        except (ValueError, IndexError):
            size = 0
        if size < 1:
            number = str(value).upper().removesuffix("B").removesuffix("G")
            meant = f"; write {number}B" if number.isdigit() and str(value).upper().endswith(("G", "GB")) else ""
            self.fail(f"must be a number of bytes, such as 500M, or 5B for 5 GB; got {value!r}{meant}", param, ctx)
        return size
