"""`mergekit-ace merge`: `mergekit-yaml`, all or nothing, whole or in parts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

import mergekit_ace
from mergekit_ace.cli.failures import reported
from mergekit_ace.output import engine, parts
from mergekit_ace.output.selection import Part, PlannedTensor, select
from mergekit_ace.output.space import require_space
from mergekit_ace.recipe.plan import read_recipe
from mergekit_ace.recipe.preflight import require_sound_inputs
from mergekit_ace.staging import staged


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
    "--only-tensors",
    "patterns",
    multiple=True,
    metavar="PATTERN",
    help="Make a part: only output tensors whose name matches this glob pattern; may be repeated",
)
@click.option(
    "--part", metavar="I/N", callback=_parse_part, help="Make a part: the I-th of N, equal in bytes, of the tensors"
)
@click.option(
    "--check-space/--no-check-space",
    default=True,
    show_default=True,
    help="End at once if the output will not fit on the disk",
)
@add_merge_options
def merge(
    merge_options: MergeOptions,
    config_file: Path,
    out_path: Path,
    overwrite: bool,
    patterns: Sequence[str],
    part: Part | None,
    check_space: bool,
) -> None:
    """Run the recipe CONFIG_FILE as mergekit-yaml does, with all its options, and write OUT_PATH.

    The output is written to OUT_PATH.partial and renamed when it is whole. A merge that fails or is stopped leaves
    nothing; one that is killed leaves OUT_PATH.partial, which the next run removes.

    With --part or --only-tensors the output is a part of a model, for `mergekit-ace join`. Every machine needs the
    same recipe and the same inputs. Methods that draw random numbers draw others in parts than in one run.
    """
    partly = part is not None or bool(patterns)
    if partly and not merge_options.safe_serialization:
        raise click.UsageError("a part of a merge is written as safetensors; drop --no-safe-serialization")
    with reported(traceback=merge_options.verbosity > 0):
        merge_options.apply_global_options()  # type: ignore[no-untyped-call]
        mergekit_ace.register()
        source = config_file.read_text(encoding="utf-8")
        written = read_recipe(config_file)
        require_sound_inputs(written, merge_options)
        recipe = written.config
        plan: list[PlannedTensor] = []
        chosen: list[PlannedTensor] = []

        def choose(tensors: Sequence[PlannedTensor]) -> Sequence[PlannedTensor]:
            plan.extend(tensors)
            chosen.extend(select(tensors, patterns, part))
            if check_space:
                require_space(out_path, sum(tensor.nbytes for tensor in chosen))
            return chosen

        inputs = [config_file, *engine.local_inputs(recipe)]
        with staged(out_path, overwrite=overwrite, inputs=inputs) as folder:
            engine.merge_adapters(recipe, merge_options)
            engine.run(recipe, source, folder, merge_options, choose)
            if partly:
                parts.seal(folder, parts.describe_merge(recipe, merge_options, plan), chosen)
