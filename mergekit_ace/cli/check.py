"""`mergekit-ace check`: what is wrong with a recipe, before the merge."""

from __future__ import annotations

import datetime
from pathlib import Path

import click
from mergekit.options import MergeOptions, add_merge_options
from rich.console import Console
from rich.filesize import decimal

from mergekit_ace.adapters.truncation import Rank
from mergekit_ace.checks.whole_recipe import Examination, check_recipe
from mergekit_ace.cli.adapters import check_adapters, parse_rank
from mergekit_ace.cli.counts import counted
from mergekit_ace.cli.help import Command

_EXIT_STATUSES = {0: "no errors", 1: "errors (with --strict, warnings too)", 2: "the command line is wrong"}


@click.command("check", cls=Command, exit_statuses=_EXIT_STATUSES)
@click.argument("config_file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--strict", is_flag=True, help="End with status 1 for warnings too")
@click.option("--adapter", is_flag=True, help="Check for merge --adapter: from the adapters alone, without a base")
@click.option("--rank", callback=parse_rank, metavar="N|auto", help="With --adapter: what this rank would keep")
@add_merge_options
def check(merge_options: MergeOptions, config_file: Path, strict: bool, adapter: bool, rank: Rank) -> None:
    """Find what mergekit would ignore without a message in the recipe CONFIG_FILE; takes the options of mergekit-yaml.

    Unknown keys and parameters, filters that match nothing, files that are missing or cut short, experts that are the
    base itself or not its fine-tunes, tokenizers that differ, settings that cost quality. And what the merge will take
    on this machine.
    """
    merge_options.apply_global_options()  # type: ignore[no-untyped-call]
    if adapter:
        check_adapters(config_file, merge_options, rank=rank, strict=strict)
        return
    if rank is not None:
        raise click.UsageError("--rank is that of an adapter; add --adapter")
    examination = check_recipe(config_file, merge_options)
    _show(examination)
    if examination.errors or (strict and examination.warnings):
        raise click.exceptions.Exit(1)


def _show(examination: Examination) -> None:
    from mergekit_ace.report.terminal import print_findings

    print_findings(examination.findings, Console(highlight=False))
    click.echo(f"{counted(examination.errors, 'error')}, {counted(examination.warnings, 'warning')}")
    cost = examination.cost
    if cost is not None:
        click.echo(f"reads {decimal(cost.read)}, writes {decimal(cost.written)}")
        click.echo(f"memory: about {decimal(cost.memory)}; on a device about {decimal(cost.workspace)} (estimates)")
        if cost.seconds is not None:
            click.echo(
                f"time: {_duration(cost.seconds)} of arithmetic on this machine, beside reading and writing (estimate)"
            )


def _duration(seconds: float) -> str:
    if seconds < 1:
        return "less than 1 s"
    return f"about {seconds:.0f} s" if seconds < 120 else f"about {datetime.timedelta(seconds=round(seconds))}"
