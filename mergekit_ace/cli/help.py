"""The help text of commands that take mergekit's options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click
from mergekit.options import PrettyPrintHelp


class Command(PrettyPrintHelp):
    """A command that groups mergekit's options as mergekit does, and explains its exit statuses at the end.

    Args:
        exit_statuses: status -> when the command ends with it.
    """

    def __init__(self, *args: Any, exit_statuses: Mapping[int, str], **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.exit_statuses = exit_statuses

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the exit statuses as a list of their own."""
        with formatter.section("Exit status"):
            formatter.write_dl([(str(status), meaning) for status, meaning in self.exit_statuses.items()])
        super().format_epilog(ctx, formatter)
