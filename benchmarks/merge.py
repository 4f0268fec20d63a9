"""Whole merges: ACE beside `ties` and `task_arithmetic`, mergekit's executor beside this project's engine.

python -m benchmarks.merge [--case NAME]... [--recipe NAME]... [--engine NAME]... [--rounds N] [--layers N]
    [--name STEM]

Every run is a process of its own, start and imports included. Checkpoints have the real names and shapes and made-up
weights; they are written under `--work` and deleted afterwards, unless told to keep them. What a results folder holds
of the same case is replaced, all else is kept.
"""

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import click
import torch
import yaml

from benchmarks.speed.checkpoints import LLAMA_1B, LLAMA_3B, LLAMA_70B, ROBERTA, Architecture, write_base, write_expert
from benchmarks.speed.command import Command, Usage, run_merge
from benchmarks.speed.record import Record, Run, Target, machine
from benchmarks.speed.tables import environment_line, runs_table, targets_table

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class Case:
    """Checkpoints, and how they are merged."""

    architecture: Architecture
    experts: int
    options: tuple[str, ...] = ()
    rounds: int = 1
    layers: int | None = None
    """Of a shortened model; None for the real depth."""


SHARDED = ("--out-shard-size", "1B")
"""mergekit holds a whole output shard in memory, 5 GB unless told otherwise."""
A_LAYER = ("--out-shard-size", "125M")
"""A layer of the 1B model a file: two workers share a shortened model too."""

CASES = {
    "roberta": Case(architecture=ROBERTA, experts=8, rounds=3),
    "llama-1b": Case(architecture=LLAMA_1B, experts=3, options=A_LAYER),
    "llama-3b": Case(architecture=LLAMA_3B, experts=3, options=SHARDED),
    "llama-70b": Case(architecture=LLAMA_70B, experts=8, options=SHARDED, layers=1),
}
YAML = "mergekit-yaml"
ENGINES: Mapping[str, tuple[Command, tuple[str, ...]]] = {
    YAML: ("mergekit-yaml", ()),
    "engine": ("mergekit-ace", ()),
    "engine, 2 processes": ("mergekit-ace", ("--workers", "2")),
    "engine, Ray with 2": ("mergekit-ace", ("--workers", "2", "--ray")),
}
"""What runs the merge; all of them with the same recipe and the same sizes of the output's files."""

BASELINE = "ties"
RECIPES: Mapping[str, Mapping[str, object]] = {
    "ace": {"merge_method": "ace"},
    "ace published": {"merge_method": "ace", "parameters": {"preset": "published"}},
    "ace refined": {"merge_method": "ace", "parameters": {"preset": "published", "heterogeneity_threshold": 0.0}},
    BASELINE: {"merge_method": "ties", "parameters": {"weight": 1.0, "density": 0.5}},
    "task_arithmetic": {"merge_method": "task_arithmetic", "parameters": {"weight": 0.3}},
}
"""`ace refined` takes the dearer branch in every layer, which few real ones do."""


def checkpoints(case: Case, layers: int, folder: Path) -> tuple[Path, list[Path]]:
    """Base and experts in `folder`; written unless they are there."""
    base, experts = folder / "base", [folder / f"expert{place}" for place in range(case.experts)]
    if not folder.is_dir():
        partial = folder.with_name(folder.name + ".partial")
        write_base(case.architecture, layers, partial / base.name)
        for place, expert in enumerate(experts):
            write_expert(case.architecture, layers, partial / expert.name, partial / base.name, place)
        partial.rename(folder)
    return base, experts


def measure(
    case: Case,
    base: Path,
    experts: list[Path],
    layers: int,
    recipes: list[str],
    rounds: int,
    work: Path,
    device: str,
    engines: tuple[str, ...] = (YAML,),
) -> list[Run]:
    """Run all recipes in turns."""
    architecture = case.architecture
    names = {(recipe, engine): label(recipe, engine) for recipe in recipes for engine in engines}
    usages: dict[str, list[Usage]] = {name: [] for name in names.values()}
    for place in range(rounds):
        for (recipe, engine), name in names.items():
            command, more = ENGINES[engine]
            file = work / "recipe.yml"
            file.write_text(document(recipe, architecture, base, experts), encoding="utf-8")
            out = work / "merged"
            flags = ["--cuda"] if device == "cuda" else []
            usage = run_merge(command, file, out, "--no-copy-tokenizer", "--quiet", *case.options, *flags, *more)
            shutil.rmtree(out)
            usages[name].append(usage)
            click.echo(
                f"{architecture.name}, {layers} layers, {name}, round {place + 1}: {usage.seconds:.1f} s, "
                f"{usage.cpu_seconds:.1f} s of CPU, "
                f"{usage.peak_rss / 1e9:.2f} GB"
            )
    return [
        Run(
            checkpoint=f"{architecture.name}, {case.experts} experts, {str(architecture.dtype).removeprefix('torch.')}",
            layers=layers,
            recipe=recipe,
            seconds=[round(usage.seconds, 2) for usage in found],
            cpu_seconds=[round(usage.cpu_seconds, 2) for usage in found],
            peak_rss=[usage.peak_rss for usage in found],
            peak_anonymous=[usage.peak_anonymous for usage in found],
            peak_device=[usage.peak_device for usage in found],
        )
        for recipe, found in usages.items()
    ]


def label(recipe: str, engine: str) -> str:
    """How a run is called in the tables."""
    return recipe if engine == YAML else f"{recipe}, {engine}"


def document(recipe: str, architecture: Architecture, base: Path, experts: list[Path]) -> str:
    content = {
        "models": [{"model": str(expert)} for expert in experts],
        "base_model": str(base),
        "dtype": str(architecture.dtype).removeprefix("torch."),
        **RECIPES[recipe],
    }
    return yaml.safe_dump(content, sort_keys=False)


def targets(record: Record) -> list[Target]:
    """The numbers to reach, of both presets where both were run."""

    def runs(architecture: Architecture) -> list[Run]:
        return [run for run in record.runs if run.checkpoint.startswith(architecture.name)]

    eight = runs(ROBERTA)
    ties = [run for run in eight if run.recipe == BASELINE]
    found = []
    for recipe in ("ace", "ace published"):
        ratios = [run.ratio(ties[0]) for run in eight if ties and run.recipe == recipe]
        what = f"{ROBERTA.name}, eight experts: seconds of {recipe} / of {BASELINE}"
        found.append(Target(what=what, limit=1.5, value=max(ratios, default=None)))
    for architecture, limit in ((LLAMA_1B, 8), (LLAMA_3B, 10)):
        whole = [run for run in runs(architecture) if run.layers == architecture.layers]
        peaks = [max(run.peak_rss) / 1e9 for run in whole if run.recipe.startswith("ace")]
        what = f"{architecture.name}, three experts: peak RSS of any ace recipe, GB"
        found.append(Target(what=what, limit=limit, value=max(peaks, default=None)))
    return [*found, *engine_targets(runs(LLAMA_1B))]


def engine_targets(runs: list[Run]) -> list[Target]:
    """What this project's engine may take, of the depths at which it was run."""
    found = []
    for layers in sorted({run.layers for run in runs}):
        ace = {run.recipe: run for run in runs if run.layers == layers}
        for one, other, limit, what in (
            ("engine", YAML, 1.02, "one process / mergekit-yaml"),
            ("engine, 2 processes", "engine", 1.0, "two processes / one with two threads"),
        ):
            ours, theirs = ace.get(label("ace", one)), ace.get(label("ace", other))
            if ours and theirs:
                title = f"{LLAMA_1B.name}, {layers} layers, engine: seconds of {what}"
                found.append(Target(what=title, limit=limit, value=ours.ratio(theirs)))
    return found


def extrapolations(record: Record) -> list[str]:
    """Seconds of a whole model by the difference of two depths, where it was not run at its full depth."""
    lines = []
    for architecture in {case.architecture.name: case.architecture for case in CASES.values()}.values():
        for recipe in RECIPES:
            runs = [r for r in record.runs if r.checkpoint.startswith(architecture.name) and r.recipe == recipe]
            depths = {run.layers: min(run.seconds) for run in runs}
            if len(depths) < 2 or architecture.layers in depths:
                continue
            few, many = min(depths), max(depths)
            layer = (depths[many] - depths[few]) / (many - few)
            whole = depths[many] + layer * (architecture.layers - many)
            lines.append(
                f"- {architecture.name}, {recipe}: {layer:.1f} s a layer, so about {whole / 60:.1f} minutes for all "
                f"{architecture.layers} (from {few} and {many} layers; not run whole)."
            )
    return lines


def report(record: Record) -> str:
    parts = ["# Whole merges\n", environment_line(record), targets_table(targets(record)), runs_table(record, BASELINE)]
    return "\n".join([*parts, *extrapolations(record)]).rstrip() + "\n"


@click.command(help=__doc__)
@click.option("--case", "cases", type=click.Choice(list(CASES)), multiple=True, help="Only these; may be repeated.")
@click.option("--recipe", "recipes", type=click.Choice(list(RECIPES)), multiple=True, help="Only these, likewise.")
@click.option(
    "--engine", "engines", type=click.Choice(list(ENGINES)), multiple=True, help="These; [default: mergekit-yaml]"
)
@click.option("--rounds", type=click.IntRange(min=1), help="[default: 3 of roberta, else 1]")
@click.option(
    "--layers", type=click.IntRange(min=1), help="Of a shortened model. [default: the real depth; 1 of llama-70b]"
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option(
    "--work", type=click.Path(path_type=Path), help="Holds the checkpoints: 13 GB for llama-1b, 33 for 3b, 17 for 70b."
)
@click.option("--keep", is_flag=True, help="Leave the checkpoints in --work, and use those that are there.")
@click.option("--name", "stem", default="merge", show_default=True, help="Of the files with the results.")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS, show_default="benchmarks/results")
def main(
    cases: tuple[str, ...],
    recipes: tuple[str, ...],
    engines: tuple[str, ...],
    rounds: int | None,
    layers: int | None,
    device: str,
    work: Path | None,
    keep: bool,
    stem: str,
    results: Path,
) -> None:
    """See the module's docstring."""
    if device == "cuda" and not torch.cuda.is_available():
        click.echo("no CUDA device on this machine: nothing was measured")
        return
    stem = stem if device == "cpu" else f"{stem}-{device}"
    record = Record.load(results / f"{stem}.json")
    record.environment = machine(device)
    for name in cases or CASES:
        case = CASES[name]
        depth = layers or case.layers or case.architecture.layers
        with tempfile.TemporaryDirectory(prefix="merge-", dir=work) as scratch:
            folder = (work if work and keep else Path(scratch)).resolve() / f"{name}-{depth}"
            base, experts = checkpoints(case, depth, folder)
            chosen = list(recipes or RECIPES)
            times, place = rounds or case.rounds, Path(scratch).resolve()
            found = measure(case, base, experts, depth, chosen, times, place, device, engines or (YAML,))
        for run in found:
            record.add(run)
        record.save(results / f"{stem}.json")
        (results / f"{stem}.md").write_text(report(record), encoding="utf-8")
    click.echo(report(record))


if __name__ == "__main__":
    main()
