"""`mergekit-ace inspect`: what a merge will do to each tensor, before it is done."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import click
from mergekit.options import MergeOptions, add_merge_options

from mergekit_ace.cli.help import Command
from mergekit_ace.recipe.failures import RecipeError
from mergekit_ace.recipe.plan import Plan, planned
from mergekit_ace.recipe.preflight import require_sound_inputs
from mergekit_ace.recipe.reading import read_recipe
from mergekit_ace.report.advice import advise
from mergekit_ace.report.as_csv import write_csv
from mergekit_ace.report.as_json import write_json
from mergekit_ace.report.inspection import assemble, inspect_tensor, work
from mergekit_ace.report.model import LayerReport, Mode, Report

_INTERRUPTED = 130
_EXIT_STATUSES = {
    0: "measured",
    1: "the merge would fail, or an expert adds nothing; what could be measured is reported",
    2: "the command line is wrong",
    _INTERRUPTED: "interrupted",
}
_FILE = click.Path(dir_okay=False, path_type=Path)


def _in_folder(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    if value is not None and not value.absolute().parent.is_dir():
        raise click.BadParameter(f"the folder {value.parent} must exist")
    return value


@click.command("inspect", cls=Command, exit_statuses=_EXIT_STATUSES)
@click.argument("config_file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--fast", is_flag=True, help="Norms, traces and heterogeneity only: one read of the files")
@click.option("--json", "json_file", type=_FILE, callback=_in_folder, help="Write everything measured")
@click.option("--csv", "csv_file", type=_FILE, callback=_in_folder, help="Write a table, one row a tensor")
@click.option("--html", "html_file", type=_FILE, callback=_in_folder, help="Write a self-contained page with pictures")
@click.option(
    "--png",
    "png_folder",
    type=click.Path(file_okay=False, path_type=Path),
    callback=_in_folder,
    help="Write the pictures to this folder, for papers",
)
@click.option(
    "--spectra",
    "patterns",
    multiple=True,
    metavar="PATTERN",
    help="Tensors whose spectra are drawn, by glob pattern; may be repeated  [default: the refined and the worst]",
)
@add_merge_options
def inspect(
    merge_options: MergeOptions,
    config_file: Path,
    fast: bool,
    json_file: Path | None,
    csv_file: Path | None,
    html_file: Path | None,
    png_folder: Path | None,
    patterns: Sequence[str],
) -> None:
    """Report what the merge of the recipe CONFIG_FILE will do, tensor by tensor; takes the options of mergekit-yaml.

    One tensor of every model is held at a time, and no model is written. Ctrl-C ends it early: what was measured until
    then is shown and written.
    """
    merge_options.apply_global_options()  # type: ignore[no-untyped-call]
    try:
        recipe = read_recipe(config_file)
        require_sound_inputs(recipe, merge_options)
        with planned(recipe, merge_options) as plan:
            report = _measure(plan, "fast" if fast else "full", quiet=merge_options.quiet)
    except RecipeError as error:
        raise click.ClickException(str(error)) from error
    _write(report, json_file, csv_file, html_file, png_folder, patterns)
    _show(report)
    if not report.complete:
        raise click.exceptions.Exit(_INTERRUPTED)
    if any(finding.level == "error" for finding in advise(report)):
        raise click.exceptions.Exit(1)


def _measure(plan: Plan, mode: Mode, *, quiet: bool) -> Report:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    layers: list[LayerReport] = []
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as progress:
        amounts = [work(tensor, mode) for tensor in plan.tensors]
        task = progress.add_task("measuring", total=sum(amounts))
        try:
            for tensor, amount in zip(plan.tensors, amounts, strict=True):
                layers.extend(inspect_tensor(plan, tensor, mode))
                progress.advance(task, amount)
        except KeyboardInterrupt:
            return assemble(plan, layers, mode, complete=False)
    return assemble(plan, layers, mode)


def _write(
    report: Report,
    json_file: Path | None,
    csv_file: Path | None,
    html_file: Path | None,
    png_folder: Path | None,
    patterns: Sequence[str],
) -> None:
    chosen = [layer for layer in report.layers if any(fnmatchcase(layer.name, pattern) for pattern in patterns)]
    if json_file is not None:
        write_json(report, json_file)
    if csv_file is not None:
        write_csv(report, csv_file)
    if html_file is not None:
        from mergekit_ace.report.as_html import write_html

        write_html(report, html_file, chosen if patterns else None)
    if png_folder is not None:
        from mergekit_ace.report.as_png import write_png

        write_png(report, png_folder, chosen if patterns else None)


def _show(report: Report) -> None:
    from rich.console import Console

    from mergekit_ace.report.terminal import print_summary

    print_summary(report, Console(highlight=False))
