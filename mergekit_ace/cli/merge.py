"""`mergekit-ace merge`: a recipe's model or a part of it, by one worker or many; it appears when it is complete."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import click
from click.core import ParameterSource
from mergekit.options import MergeOptions, add_merge_options

import mergekit_ace
from mergekit_ace.adapters.truncation import Rank
from mergekit_ace.checks.devices import require_device
from mergekit_ace.checks.preflight import check_unread, require_sound_inputs
from mergekit_ace.cli import progress
from mergekit_ace.cli.adapters import parse_rank, write_adapter
from mergekit_ace.cli.failures import describe, reported
from mergekit_ace.cli.help import Command
from mergekit_ace.engine.driver import Outcome, Request
from mergekit_ace.engine.driver import merge as run_merge
from mergekit_ace.engine.dry_run import dry_run
from mergekit_ace.engine.events import Event
from mergekit_ace.engine.part import Part
from mergekit_ace.engine.workers.ray_cluster import LOCAL
from mergekit_ace.engine.workers.staffing import Staff
from mergekit_ace.printable import printable
from mergekit_ace.recipe.findings import Finding
from mergekit_ace.recipe.reading import read_recipe

_EXIT_STATUSES = {
    0: "the output is complete",
    1: "it failed; OUT_PATH is as it was before",
    2: "the command line is wrong",
    130: "stopped by Ctrl-C (143: by SIGTERM); --resume goes on",
}
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def _parse_part(ctx: click.Context, param: click.Parameter, value: str | None) -> Part | None:
    try:
        if value == "auto":
            return Part.of_environment(os.environ)
        return None if value is None else Part.parse(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _parse_workers(ctx: click.Context, param: click.Parameter, value: str | None) -> int | Literal["auto"] | None:
    if value is None or value == "auto":
        return value  # type: ignore[return-value]
    if not value.isdecimal() or int(value) < 1:
        raise click.BadParameter(f"must be a number from 1 or auto; got {value!r}")
    return int(value)


def _parse_bytes(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    text = value.upper().removesuffix("B")
    number, unit = (text[:-1], text[-1]) if text[-1:] in _UNITS else (text, "")
    try:
        size = float(number) * _UNITS[unit]
    except ValueError:
        size = 0
    if not 0 < size < 2**63:
        raise click.BadParameter(f"must be a size such as 24G; got {value!r}")
    return int(size)


# Options of a merge to a model alone, by parameter.
_OF_MODELS = {
    "dry_run": "--dry-run",
    "patterns": "--only-tensors",
    "part": "--part",
    "workers": "--workers",
    "ray": "--ray",
    "memory": "--memory",
    "log_json": "--log-json",
    "resume": "--resume",
}


@click.command("merge", cls=Command, exit_statuses=_EXIT_STATUSES)
@click.argument("config_file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out_path", type=click.Path(path_type=Path))
@click.option("--overwrite", is_flag=True, help="Replace a model in OUT_PATH, once the new one is whole")
@click.option(
    "--resume/--no-resume",
    default=None,
    help="Go on with the files that an interrupted run finished, or start over",
)
@click.option(
    "--only-tensors",
    "patterns",
    multiple=True,
    metavar="PATTERN",
    help="Make a part: only output tensors whose name matches this glob pattern; may be repeated",
)
@click.option(
    "--part",
    metavar="I/N|auto",
    callback=_parse_part,
    help="Make a part: the I-th of N, of equal cost, of the output's files; auto takes I and N from a scheduler",
)
@click.option(
    "--workers",
    metavar="N|auto",
    callback=_parse_workers,
    help="Processes that share the merge; auto is one a GPU, or one for every two cores  [default: 1; auto with "
    "--multi-gpu or --ray]",
)
@click.option(
    "--ray",
    metavar="ADDRESS",
    is_flag=False,
    flag_value=LOCAL,
    help="Share the merge on the Ray cluster at this address, or on a new one on this machine",
)
@click.option(
    "--memory", metavar="SIZE", callback=_parse_bytes, help="Bytes for all workers of this machine, such as 24G"
)
@click.option("--dry-run", is_flag=True, help="Show what would be made, and make nothing")
@click.option(
    "--log-json",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path, allow_dash=True),
    help="Write what happens as lines of JSON; - is the standard output",
)
@click.option(
    "--check-space/--no-check-space",
    default=True,
    show_default=True,
    help="End before the merge if the output will not fit on the disk",
)
@click.option(
    "--strict",
    is_flag=True,
    help="Do not start if the inputs give a warning, or hold a tensor that the output would lack",
)
@click.option("--adapter", is_flag=True, help="Write one adapter out of a recipe's adapters; it needs no base")
@click.option(
    "--rank",
    callback=parse_rank,
    metavar="N|auto",
    help="With --adapter: the rank of the result; auto: the smallest that keeps 99 percent  [default: without loss]",
)
@add_merge_options
@click.pass_context
def merge(
    ctx: click.Context,
    merge_options: MergeOptions,
    config_file: Path,
    out_path: Path,
    overwrite: bool,
    resume: bool | None,
    patterns: Sequence[str],
    part: Part | None,
    workers: int | Literal["auto"] | None,
    ray: str | None,
    memory: int | None,
    dry_run: bool,
    log_json: Path | None,
    check_space: bool,
    strict: bool,
    adapter: bool,
    rank: Rank,
) -> None:
    """Run the recipe CONFIG_FILE as mergekit-yaml does, with all its options, and write OUT_PATH.

    The output is written to OUT_PATH.partial and renamed when it is whole. A merge that is interrupted leaves its
    finished files there: --resume goes on with those whose recipe and inputs are still the same.

    With --part or --only-tensors the output is a part of a model, for `mergekit-ace join`. Every machine needs the
    same recipe and the same inputs.

    With --adapter every model of the recipe is base+adapter, and the output is an adapter of that base.
    """
    partly = part is not None or bool(patterns)
    if rank is not None and not adapter:
        raise click.UsageError("--rank is that of an adapter; add --adapter")
    if adapter:
        _require_flags_of_adapters(ctx, merge_options)
    if partly and not merge_options.safe_serialization:
        raise click.UsageError("a part of a merge is written as safetensors; drop --no-safe-serialization")
    given = ctx.get_parameter_source("out_shard_size") not in (None, ParameterSource.DEFAULT)
    with reported(traceback=merge_options.verbosity > 0):
        merge_options.apply_global_options()  # type: ignore[no-untyped-call]
        mergekit_ace.register()
        here = _on_this_machine(merge_options, ray)
        require_device(_on_devices(here))
        options = _on_devices(merge_options)
        recipe = read_recipe(config_file)
        if adapter:
            write_adapter(recipe.config, config_file, out_path, options, rank=rank, overwrite=overwrite, strict=strict)
            _show(check_unread(recipe))
            return
        warnings = require_sound_inputs(recipe, here, strict=strict)
        request = Request(
            recipe=recipe,
            options=options,
            out=out_path,
            shard_size=merge_options.out_shard_size if given else None,
            patterns=patterns,
            part=part,
            overwrite=overwrite,
            resume=resume,
            check_space=check_space,
            strict=strict,
        )
        if dry_run:
            _show_plan(request)
            return
        share: int | Literal["auto"] = "auto" if merge_options.multi_gpu or ray is not None else 1
        outcome = _run(request, Staff(workers=workers or share, memory=memory, ray=ray), log_json)
        _show((*warnings, *outcome.lost))


def _require_flags_of_adapters(ctx: click.Context, options: MergeOptions) -> None:
    """Refuse what would have no effect on an adapter."""
    given = [flag for name, flag in _OF_MODELS.items() if ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE]
    if "--dry-run" in given:
        raise click.UsageError("what --adapter would make is shown by mergekit-ace check --adapter; drop --dry-run")
    if given:
        raise click.UsageError(
            f"an adapter is small, and is not made in parts, by workers or in several runs; drop {given[0]}"
        )
    if not options.safe_serialization:
        raise click.UsageError("an adapter is written as safetensors; drop --no-safe-serialization")


def _show(findings: Iterable[Finding]) -> None:
    for finding in findings:
        click.echo(printable(f"{finding.level}: {finding.what}\n    {finding.remedy}"), err=True)


def _on_devices(options: MergeOptions) -> MergeOptions:
    """The options with `--multi-gpu` as what it means here: one worker a GPU."""
    return options.model_copy(update={"cuda": True, "device": "cuda"}) if options.multi_gpu else options


def _on_this_machine(options: MergeOptions, ray: str | None) -> MergeOptions:
    """What this machine must have for a merge: no device where a Ray cluster's nodes have them."""
    if ray in (None, LOCAL):
        return options
    return options.model_copy(update={"cuda": False, "multi_gpu": False, "device": None})


def _show_plan(request: Request) -> None:
    click.echo(progress.plan_text(dry_run(request)))


def _run(request: Request, staff: Staff, log: Path | None) -> Outcome:
    quiet = request.options.quiet
    last: dict[str, Any] = {"event": "failed", "error": "stopped"}
    try:
        with contextlib.ExitStack() as stack:
            watchers = [stack.enter_context(progress.progress_line(quiet=quiet))]
            if log is not None:
                watchers.append(stack.enter_context(progress.json_log(log)))

            def watch(event: Event) -> None:
                for watcher in watchers:
                    watcher(event)

            outcome = run_merge(request, staff, watch)
        last = progress.outcome_fields(outcome)
        if not quiet and log != Path("-"):
            click.echo(progress.summary(outcome))
        return outcome
    except Exception as error:
        last["error"] = describe(error)
        raise
    finally:
        if log is not None:
            progress.log_end(log, **last)
