"""The help text of commands that take mergekit's options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click
from mergekit.options import PrettyPrintHelp, ShardSizeParamType

from mergekit_ace.cli.sizes import ShardSize


class Command(PrettyPrintHelp):
    """A command that groups mergekit's options as mergekit does, and explains its exit statuses at the end.

    A size that mergekit's option cannot read is a usage error.

    Args:
        exit_statuses: status -> when the command ends with it.
    """

    def __init__(self, *args: Any, exit_statuses: Mapping[int, str], **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.exit_statuses = exit_statuses
        for param in self.params:
            if isinstance(param.type, ShardSizeParamType):
                param.type = ShardSize()

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the exit statuses as a list of their own."""
        with formatter.section("Exit status"):
            formatter.write_dl([(str(status), meaning) for status, meaning in self.exit_statuses.items()])
        super().format_epilog(ctx, formatter)
