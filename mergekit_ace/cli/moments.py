"""`mergekit-ace moments`: measure the experts' second moments on a few prompts."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import click
from mergekit.common import ModelReference
from mergekit.options import MergeOptions, add_merge_options

from mergekit_ace.cli.failures import reported
from mergekit_ace.cli.help import Command
from mergekit_ace.collecting.collect import FEWEST_TOKENS, Collected, Progress, Settings, collect
from mergekit_ace.collecting.prompts import Prompt, read_prompts
from mergekit_ace.moments.load import last_part
from mergekit_ace.recipe.failures import RecipeError
from mergekit_ace.recipe.plan import Plan
from mergekit_ace.recipe.planning import planned
from mergekit_ace.recipe.reading import read_recipe

LOG = logging.getLogger("mergekit_ace")

_EXIT_STATUSES = {
    0: "measured",
    1: "it failed",
    2: "the command line is wrong",
    130: "stopped by Ctrl-C (143: by SIGTERM); the same command goes on",
}


def _parse_prompts(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> list[tuple[str, Path]]:
    pairs = []
    for value in values:
        name, equals, path = value.rpartition("=")
        if not equals or not name or not path:
            raise click.BadParameter(f"must be NAME=FILE; got {value!r}")
        pairs.append((name, Path(path)))
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise click.BadParameter(f"{name} must be given once; put its files into one folder")
    return pairs


@click.command("moments", cls=Command, exit_statuses=_EXIT_STATUSES)
@click.argument("config_file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--prompts",
    "prompt_files",
    multiple=True,
    metavar="NAME=FILE",
    callback=_parse_prompts,
    help="Prompts of an expert, by the last part of its path or the whole of it: .txt (one a line), .jsonl (prompt, "
    "text or messages) or a folder; once for each expert that has some",
)
@click.option(
    "--self-prompts",
    type=click.IntRange(min=1),
    metavar="N",
    help="Of every expert without --prompts, N texts that it generates: no data, but every such expert is run",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The folder to write; new or empty")
@click.option(
    "--by",
    type=click.Choice(["base", "expert"]),
    default="base",
    show_default=True,
    help="Whose activations: the base is run over all prompts, or each expert over its own",
)
@click.option(
    "--tokens",
    type=click.IntRange(min=FEWEST_TOKENS),
    default=1024,
    show_default=True,
    help="Tokens sampled for each layer and expert, at most. The files grow with it: 1024 are 1.7 GB an expert of 8B",
)
@click.option(
    "--run-dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="In which the model is run; auto: in which it is stored",
)
@click.option("--offload", is_flag=True, help="Run a model larger than the memory, from the disk (slow)")
@add_merge_options
def moments(
    merge_options: MergeOptions,
    config_file: Path,
    prompt_files: list[tuple[str, Path]],
    self_prompts: int | None,
    out: Path,
    by: Literal["base", "expert"],
    tokens: int,
    run_dtype: str,
    offload: bool,
) -> None:
    """Measure the inputs of every layer that the recipe CONFIG_FILE merges, on a few prompts of its experts.

    For ace, wudi and actmat: set moments to the folder in the recipe's parameters. An expert without prompts keeps the
    estimate from its task vector. A few prompts of the expert's own task are enough, with answers where there are some.
    With --self-prompts the experts generate the prompts.

    The folder holds the second moment of some tokens' activations, no prompts and no tokens. Keep it as private as the
    prompts all the same: activations hold information on what they were made from.

    A run that was stopped is continued by the same command.
    """
    if not prompt_files and self_prompts is None:
        raise click.UsageError("Give --prompts NAME=FILE for some experts, or --self-prompts N")
    with reported(traceback=merge_options.verbosity > 0):
        merge_options.apply_global_options()  # type: ignore[no-untyped-call]
        recipe = read_recipe(config_file)
        read = {name: read_prompts(path) for name, path in prompt_files}
        with planned(recipe, merge_options, adapters_unmerged=True) as plan, tempfile.TemporaryDirectory() as folder:
            collected = collect(
                plan,
                _by_expert(plan, read, others=self_prompts is not None),
                out,
                Settings(
                    by=by,
                    tokens=tokens,
                    self_prompts=self_prompts or 0,
                    seed=merge_options.random_seed or 0,
                    dtype=run_dtype,
                    device=plan.device,
                    offload=folder if offload else None,
                ),
                _progress(quiet=merge_options.quiet),
            )
    _show(collected, out)


def _by_expert(
    plan: Plan, read: dict[str, list[Prompt]], *, others: bool
) -> dict[str, tuple[ModelReference, list[Prompt] | None]]:
    """Each list of prompts with the expert that its name stands for; None for the others, if they are wanted too.

    Raises:
        RecipeError: a name that stands for none, or for several.
    """
    result: dict[str, tuple[ModelReference, list[Prompt] | None]] = {}
    for name, prompts in read.items():
        exact = [expert for expert in plan.experts if str(expert) == name]
        found = exact or [expert for expert in plan.experts if last_part(str(expert)) == name]
        if len(found) != 1:
            known = ", ".join(last_part(str(expert)) for expert in plan.experts)
            raise RecipeError(
                f"--prompts {name}: the name must be that of one expert of the recipe, by the last part of its path or "
                f"the whole of it; {'several have it' if found else f'it has {known}'}"
            )
        result[name] = (found[0], prompts)
    if others:
        given = [reference for reference, _ in result.values()]
        rest = [expert for expert in plan.experts if expert not in given]
        short = [last_part(str(expert)) for expert in plan.experts]
        for expert in rest:
            name = last_part(str(expert))
            result[name if short.count(name) == 1 else str(expert)] = (expert, None)
    return result


def _progress(*, quiet: bool) -> Progress:
    def show(what: str, done: int, total: int) -> None:
        if not quiet:
            click.echo(f"\r{what}: {done} of {total} prompts", err=True, nl=done == total)

    return show


def _show(collected: Collected, out: Path) -> None:
    for name, tokens in collected.tokens.items():
        click.echo(f"{name}: {tokens} tokens")
    click.echo(f"{collected.measured} matrices measured; {out}")
    if collected.unmeasured:
        click.echo(f"{len(collected.unmeasured)} matrices keep the estimate from their task vectors (-v lists them)")
    for tensor, reason in collected.unmeasured.items():
        LOG.info("%s: not measured, %s", tensor, reason)
