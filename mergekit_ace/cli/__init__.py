"""The command line: `mergekit-ace COMMAND`, one module a command, imported when it is called."""

from __future__ import annotations

import importlib
from typing import NamedTuple, cast

import click
from click.shell_completion import CompletionItem

from mergekit_ace import __version__


class _Command(NamedTuple):
    where: str  # module:attribute
    summary: str


# Kept here rather than in the commands, so that `--help` need not import torch to list them.
_COMMANDS = {
    "merge": _Command("mergekit_ace.cli.merge:merge", "Merge a recipe; the output appears when it is complete."),
    "join": _Command("mergekit_ace.cli.join:join", "Join the parts of a merge that was split over machines."),
    "verify": _Command("mergekit_ace.cli.verify:verify", "Check the files and values of a finished model or adapter."),
    "inspect": _Command("mergekit_ace.cli.inspect:inspect", "Report what a merge will do to each tensor and expert."),
    "check": _Command("mergekit_ace.cli.check:check", "Check a recipe before the merge."),
    "moments": _Command("mergekit_ace.cli.moments:moments", "Measure second moments on a few prompts."),
    "doctor": _Command("mergekit_ace.cli.doctor:doctor", "Show versions, startup hook, devices and precision."),
    "methods": _Command("mergekit_ace.cli.methods:methods", "List the merge methods and their parameters."),
}


class _LazyGroup(click.Group):
    """A group whose commands are imported only when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, attribute = _COMMANDS[cmd_name].where.split(":")
        command = getattr(importlib.import_module(module), attribute)
        return cast(click.Command, command)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Names of commands and options; click's own version imports every command for its summary."""
        names = [(name, command.summary) for name, command in _COMMANDS.items() if name.startswith(incomplete)]
        return [CompletionItem(name, help=summary) for name, summary in names] + click.Command.shell_complete(
            self, ctx, incomplete
        )

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.summary) for name, command in _COMMANDS.items()])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mergekit-ace")
def main() -> None:
    """ACE-Merging for mergekit: merge fine-tunes of one model without data."""
