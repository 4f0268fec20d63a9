"""The `--adapter` of `mergekit-ace merge` and `check`: one adapter out of a recipe's adapters."""

from __future__ import annotations

from pathlib import Path

import click
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from rich.console import Console
from rich.filesize import decimal

from mergekit_ace.adapters.examination import Outlook, examine_adapters
from mergekit_ace.adapters.from_recipe import request_of
from mergekit_ace.adapters.truncation import Rank
from mergekit_ace.adapters.write import write_merge
from mergekit_ace.cli.counts import counted
from mergekit_ace.factors.tensors import AdapterError
from mergekit_ace.staging import staged


def parse_rank(ctx: click.Context, param: click.Parameter, value: str | None) -> Rank:
    """A rank as on the command line: a number, or `auto`."""
    if value is None or value == "auto":
        return value  # type: ignore[return-value]
    if not value.isdecimal() or int(value) == 0:
        raise click.BadParameter(f"must be a whole number above 0, or auto; got {value}")
    return int(value)


def write_adapter(
    recipe: MergeConfiguration,
    config_file: Path,
    out_path: Path,
    options: MergeOptions,
    *,
    rank: Rank,
    overwrite: bool,
    strict: bool,
) -> None:
    """Merge the adapters of a recipe to `out_path`, whole or not at all.

    Raises:
        AdapterError: as `request_of` and the merge; with `strict`, for what `check` warns of too.
    """
    if strict:
        found = [finding for finding in examine_adapters(config_file, options).findings if finding.level != "hint"]
        if found:
            raise AdapterError("\n".join(f"{finding.what}. {finding.remedy}" for finding in found))
    request = request_of(recipe, options, rank=rank)
    adapters = [Path(entry.model.lora.path) for entry in recipe.models or [] if entry.model.lora is not None]
    inputs = [config_file, *(adapter for adapter in adapters if adapter.exists())]
    with staged(out_path, overwrite=overwrite, inputs=inputs) as folder:
        report = write_merge(request, folder, recipe=config_file.read_text(encoding="utf-8"))
    if not options.quiet:
        kept = "" if rank is None else f", which hold {report.energy_kept:.1%} of the energy"
        click.echo(f"{out_path}: {counted(len(report.adapters), 'adapter')} in one of rank {report.rank}{kept}")


def check_adapters(config_file: Path, options: MergeOptions, *, rank: Rank, strict: bool) -> None:
    """Print what is wrong with a recipe of adapters, and what the merge will give; end with status 1 for errors."""
    from mergekit_ace.report.terminal import print_findings

    examination = examine_adapters(config_file, options, rank=rank)
    print_findings(examination.findings, Console(highlight=False))
    errors, warnings = examination.count("error"), examination.count("warning")
    click.echo(f"{counted(errors, 'error')}, {counted(warnings, 'warning')}")
    if examination.outlook is not None:
        for line in _described(examination.outlook):
            click.echo(line)
    if errors or (strict and warnings):
        raise click.exceptions.Exit(1)


def _described(outlook: Outlook) -> list[str]:
    lines = [f"{name}: rank {rank}" for name, rank in outlook.adapters]
    lines.append(f"{outlook.weights} weights, {outlook.shared} of them adapted more than once")
    lines.append(f"one adapter of rank {outlook.rank}, {decimal(outlook.size)}")
    if outlook.merged is not None:
        lines.append(
            f"it keeps {outlook.energy_kept:.1%} of the merged updates' energy, and {outlook.outputs_kept:.1%} of each "
            "expert's own output in the mean"
        )
    return lines
