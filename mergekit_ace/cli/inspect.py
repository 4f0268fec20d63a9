"""`mergekit-ace inspect`: what a merge will do to each tensor, before it is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import click
from mergekit.options import MergeOptions, add_merge_options
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from mergekit_ace.adapters.from_recipe import request_of
from mergekit_ace.adapters.request import Request
from mergekit_ace.checks.preflight import check_unread, require_sound_inputs, require_sound_plan
from mergekit_ace.cli.help import Command
from mergekit_ace.factors.model import Place
from mergekit_ace.factors.tensors import AdapterError
from mergekit_ace.printable import printable
from mergekit_ace.recipe.failures import RecipeError
from mergekit_ace.recipe.findings import Finding
from mergekit_ace.recipe.patterns import select_names
from mergekit_ace.recipe.plan import Plan, PlannedTensor
from mergekit_ace.recipe.planning import planned
from mergekit_ace.recipe.reading import read_recipe
from mergekit_ace.report.advice import advise
from mergekit_ace.report.as_csv import write_csv
from mergekit_ace.report.as_json import write_json
from mergekit_ace.report.inspection import assemble, inspect_tensor, spectra_of_each_type, work
from mergekit_ace.report.model import Mode, Report, TensorReport
from mergekit_ace.report.of_adapters import assemble_adapters, inspect_adapters
from mergekit_ace.report.sampling import Named, sample
from mergekit_ace.report.terminal import print_summary

_Tensor = TypeVar("_Tensor", bound=Named)
_INTERRUPTED = 130
_FILE_WIDTH = 160
_EXIT_STATUSES = {
    0: "measured",
    1: "the merge would fail, or an expert adds nothing; what could be measured is reported",
    2: "the command line is wrong",
    _INTERRUPTED: "interrupted",
}
_FILE = click.Path(dir_okay=False, path_type=Path)


def _in_folder(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    if value is not None and str(value) == "-":
        raise click.BadParameter("must be a file; the standard output holds the summary")
    if value is not None and not value.absolute().parent.is_dir():
        raise click.BadParameter(f"the folder {value.parent} must exist")
    return value


@click.command("inspect", cls=Command, exit_statuses=_EXIT_STATUSES)
@click.argument("config_file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--fast", is_flag=True, help="Norms and heterogeneity only: one read of the files, no merge")
@click.option(
    "--sample",
    "per_type",
    type=click.IntRange(min=1),
    metavar="N",
    help="Measure N tensors of each layer type only, evenly spaced over the depth",
)
@click.option(
    "--only-tensors",
    "patterns",
    multiple=True,
    metavar="PATTERN",
    help="Measure only output tensors whose name matches this glob pattern; may be repeated",
)
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
    "spectra_patterns",
    multiple=True,
    metavar="PATTERN",
    help="Tensors whose singular values are measured and drawn, by glob pattern; may be repeated  [default with --html "
    "or --png: the middle one of each layer type]",
)
@click.option("--adapter", is_flag=True, help="Inspect merge --adapter: from the adapters alone, without a base")
@add_merge_options
def inspect(
    merge_options: MergeOptions,
    config_file: Path,
    fast: bool,
    per_type: int | None,
    patterns: Sequence[str],
    json_file: Path | None,
    csv_file: Path | None,
    html_file: Path | None,
    png_folder: Path | None,
    spectra_patterns: Sequence[str],
    adapter: bool,
) -> None:
    """Report what the merge of the recipe CONFIG_FILE will do, tensor by tensor; takes the options of mergekit-yaml.

    One tensor of every model is held at a time, and no model is written. A full pass merges every tensor and takes
    about one and a half times as long as the merge; --fast, --sample and --only-tensors take less. Ctrl-C ends it
    early: what was measured until then is shown and written.
    """
    merge_options.apply_global_options()  # type: ignore[no-untyped-call]
    mode: Mode = "fast" if fast else "full"
    drawn = bool(html_file or png_folder)
    warnings: Sequence[Finding] = ()
    try:
        recipe = read_recipe(config_file)
        if adapter:
            warnings = list(check_unread(recipe))
            request = request_of(recipe.config, merge_options)
            places = _choose(
                list(request.places.values()), _of_each_type, patterns, per_type, spectra_patterns, drawn=drawn
            )
            report = _measure_adapters(request, recipe.name, places, mode)
        else:
            warnings = require_sound_inputs(recipe, merge_options)
            with planned(recipe, merge_options) as plan:
                require_sound_plan(plan, complete=False)
                chosen = _choose(plan.tensors, spectra_of_each_type, patterns, per_type, spectra_patterns, drawn=drawn)
                report = _measure(plan, chosen, mode, quiet=merge_options.quiet)
    except (RecipeError, AdapterError) as error:
        raise click.ClickException(str(error)) from error
    _write(report, json_file, csv_file, html_file, png_folder)
    _show(report)
    for finding in warnings:
        click.echo(printable(f"{finding.level}: {finding.what}\n    {finding.remedy}"), err=True)
    if not report.complete:
        raise click.exceptions.Exit(_INTERRUPTED)
    if any(finding.level == "error" for finding in advise(report)):
        raise click.exceptions.Exit(1)


@dataclass(frozen=True)
class _Chosen(Generic[_Tensor]):
    tensors: Sequence[_Tensor]
    spectra: frozenset[str]
    """Names of those whose singular values are measured."""
    selection: str | None
    """In words; None: all tensors."""


def _choose(
    tensors: Sequence[_Tensor],
    worth_drawing: Callable[[Sequence[_Tensor]], Sequence[_Tensor]],
    patterns: Sequence[str],
    per_type: int | None,
    spectra_patterns: Sequence[str],
    *,
    drawn: bool,
) -> _Chosen[_Tensor]:
    try:
        chosen = _matching(tensors, patterns)
        if per_type is not None:
            chosen = sample(chosen, per_type)
        spectra = _matching(chosen, spectra_patterns) if spectra_patterns else worth_drawing(chosen)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    words = [
        *([f"names that match {' or '.join(patterns)}"] if patterns else []),
        *([f"{per_type} of each layer type"] if per_type is not None else []),
    ]
    return _Chosen(
        tensors=chosen,
        spectra=frozenset(tensor.name for tensor in spectra) if drawn or spectra_patterns else frozenset(),
        selection=f"Measured {len(chosen)} of {len(tensors)} tensors: {', '.join(words)}." if words else None,
    )


def _of_each_type(places: Sequence[Place]) -> Sequence[Place]:
    """The adapted weights whose spectra are drawn: the middle one of each layer type."""
    return sample(places, 1)


def _matching(tensors: Sequence[_Tensor], patterns: Sequence[str]) -> list[_Tensor]:
    names = select_names([tensor.name for tensor in tensors], patterns)
    return [tensor for tensor in tensors if tensor.name in names]


def _measure_adapters(request: Request, recipe: str, chosen: _Chosen[Place], mode: Mode) -> Report:
    tensors: list[TensorReport] = []
    try:
        tensors.extend(inspect_adapters(request, chosen.tensors, mode, spectra=chosen.spectra))
    except KeyboardInterrupt:
        return assemble_adapters(request, recipe, tensors, mode, selection=chosen.selection, complete=False)
    return assemble_adapters(request, recipe, tensors, mode, selection=chosen.selection)


def _measure(plan: Plan, chosen: _Chosen[PlannedTensor], mode: Mode, *, quiet: bool) -> Report:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    tensors: list[TensorReport] = []
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as progress:
        amounts = [work(tensor, mode) for tensor in chosen.tensors]
        task = progress.add_task("measuring", total=sum(amounts))
        try:
            for tensor, amount in zip(chosen.tensors, amounts, strict=True):
                tensors.extend(inspect_tensor(plan, tensor, mode, with_spectra=tensor.name in chosen.spectra))
                progress.advance(task, amount)
        except KeyboardInterrupt:
            return assemble(plan, tensors, mode, selection=chosen.selection, complete=False)
    return assemble(plan, tensors, mode, selection=chosen.selection)


def _write(
    report: Report, json_file: Path | None, csv_file: Path | None, html_file: Path | None, png_folder: Path | None
) -> None:
    if json_file is not None:
        write_json(report, json_file)
    if csv_file is not None:
        write_csv(report, csv_file)
    # matplotlib is imported only where something is drawn.
    if html_file is not None:
        from mergekit_ace.report.as_html import write_html

        write_html(report, html_file)
    if png_folder is not None:
        from mergekit_ace.report.as_png import write_png

        write_png(report, png_folder)


def _show(report: Report) -> None:
    console = Console(highlight=False)
    # A file or a pipe has no width to fit into.
    print_summary(report, console if console.is_terminal else Console(highlight=False, width=_FILE_WIDTH))
