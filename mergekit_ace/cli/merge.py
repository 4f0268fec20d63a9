"""`mergekit-ace merge`: `mergekit-yaml`, all or nothing, whole or in parts, by one worker or many."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
from click.core import ParameterSource
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

import mergekit_ace
from mergekit_ace.adapters.truncation import Rank
from mergekit_ace.cli.adapters import parse_rank, write_adapter
from mergekit_ace.cli.failures import reported
from mergekit_ace.engine.events import Event, Said
from mergekit_ace.engine.making import ShardMaker
from mergekit_ace.engine.merging import Request, Site
from mergekit_ace.engine.merging import merge as run_merge
from mergekit_ace.engine.part import Part
from mergekit_ace.engine.workers.inline import Inline
from mergekit_ace.printable import printable
from mergekit_ace.recipe.preflight import require_sound_inputs
from mergekit_ace.recipe.reading import read_recipe


def _parse_part(ctx: click.Context, param: click.Parameter, value: str | None) -> Part | None:
    try:
        return None if value is None else Part.parse(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@click.command("merge", cls=PrettyPrintHelp)
@click.argument("config_file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out_path", type=click.Path(path_type=Path))
@click.option("--overwrite", is_flag=True, help="Replace a model in OUT_PATH, once the new one is whole")
@click.option(
    "--resume/--no-resume",
    default=None,
    help="Go on with the shards that an interrupted run finished, or start over",
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
    metavar="I/N",
    callback=_parse_part,
    help="Make a part: the I-th of N, of equal cost, of the output's files",
)
@click.option(
    "--check-space/--no-check-space",
    default=True,
    show_default=True,
    help="End at once if the output will not fit on the disk",
)
@click.option(
    "--strict", is_flag=True, help="Do not start for a warning of the inputs, or if one of their tensors is lost"
)
@click.option("--adapter", is_flag=True, help="Write one adapter out of a recipe's adapters; the base is not read")
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
    if partly and adapter:
        raise click.UsageError("an adapter is small, and is not made in parts; drop --part and --only-tensors")
    if partly and not merge_options.safe_serialization:
        raise click.UsageError("a part of a merge is written as safetensors; drop --no-safe-serialization")
    given = ctx.get_parameter_source("out_shard_size") not in (None, ParameterSource.DEFAULT)
    with reported(traceback=merge_options.verbosity > 0):
        merge_options.apply_global_options()  # type: ignore[no-untyped-call]
        mergekit_ace.register()
        recipe = read_recipe(config_file)
        if adapter:
            write_adapter(recipe.config, config_file, out_path, merge_options, rank=rank, overwrite=overwrite)
            return
        warnings = require_sound_inputs(recipe, merge_options, strict=strict)
        request = Request(
            recipe=recipe,
            options=merge_options,
            out=out_path,
            shard_size=merge_options.out_shard_size if given else None,
            patterns=patterns,
            part=part,
            overwrite=overwrite,
            resume=resume,
            check_space=check_space,
            strict=strict,
        )
        outcome = run_merge(request, _employ, _show)
        for finding in (*warnings, *outcome.lost):
            click.echo(printable(f"{finding.level}: {finding.what}\n    {finding.remedy}"), err=True)


@contextlib.contextmanager
def _employ(site: Site) -> Iterator[Inline]:
    yield Inline(ShardMaker(site.plan, site.work, site.folder))


def _show(event: Event) -> None:
    if isinstance(event, Said):
        click.echo(event.text, err=True)
