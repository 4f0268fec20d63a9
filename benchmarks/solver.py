"""The layer solver against the literal steps, its plainly written peers, and bare matrix products.

python -m benchmarks.solver [--shapes MxN]... [--experts T]... [--study NAME]... [--quick] [--device cpu|cuda]

Contenders take turns in one process. What a results folder holds of the same case is replaced, all else is kept.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import click
import torch
from mergekit.merge_methods import merge_tensors

import mergekit_ace
from benchmarks.speed import contenders
from benchmarks.speed.layers import LARGE, SMALL, TABLE, Layer, Shape, adapted, fine_tuned, parse_shape
from benchmarks.speed.memory import documented_bound, measurable, peak_and_seconds
from benchmarks.speed.record import Memory, Record, Target, Timing, geometric_mean, machine
from benchmarks.speed.tables import (
    branches_table,
    contest_table,
    environment_line,
    errors_table,
    memory_table,
    targets_table,
)
from benchmarks.speed.timing import race
from mergekit_ace.matrix.workload import by_stacked_rows
from mergekit_ace.methods.catalogue import METHODS

RESULTS = Path(__file__).parent / "results"
BRANCHES = ("homogeneous", "heterogeneous")
PEERS = ("tsv_m", "iso_c", "iso_cts")
STUDIES = ("branches", "adapters", "errors", "peers", "methods", "memory")
ON_REQUEST = "alone"
EXPERTS = (3, 8, 20)
# Experts of the studies that do not vary them; the targets are stated for as many.
SEVERAL = 8
ROUNDS = 5
# Seconds after which a case gets no further round.
PATIENCE = 15.0
ADAM_STEPS = 300
# Steps that are timed where all of them would take longer than PATIENCE; their difference is the time of a step.
FEW_STEPS, MORE_STEPS = 3, 9
FEW, MANY = 2, 16
"""Experts of the study of memory."""


def measure_branch(study: str, shape: Shape, layer: Layer, branch: str, device: str) -> Timing:
    """Ours, the literal float32 steps and the floor."""
    seconds = race(
        {
            "ours": contenders.ours(layer, branch),
            "literal": contenders.literal(layer, branch),
            "floor": contenders.floor(layer),
        },
        rounds=ROUNDS,
        patience=PATIENCE,
        device=device,
    )
    return timing(study, shape, layer, seconds)


def measure_peers(shape: Shape, layer: Layer, device: str) -> Timing:
    """Our heterogeneous branch, the dearer one, and our default against the data-free peers."""
    runs = {"ours": contenders.ours(layer, "heterogeneous"), "default": contenders.ours(layer, "default")}
    runs |= {name: contenders.peer(layer, name) for name in PEERS}
    seconds = race(runs, rounds=3, patience=PATIENCE, device=device)
    few, more = (contenders.peer(layer, "wudi_adam", steps) for steps in (FEW_STEPS, MORE_STEPS))
    part = race({"few": few, "more": more}, rounds=1, patience=0, device=device)
    step = (part["more"][0] - part["few"][0]) / (MORE_STEPS - FEW_STEPS)
    whole = part["few"][0] + step * (ADAM_STEPS - FEW_STEPS)
    extrapolated = whole > PATIENCE
    if not extrapolated:
        runs = {"wudi_adam": contenders.peer(layer, "wudi_adam", ADAM_STEPS)}
        whole = race(runs, rounds=1, patience=0, device=device)["wudi_adam"][0]
    seconds["wudi_adam"] = [whole] * len(seconds["ours"])
    return timing("peers", shape, layer, seconds, extrapolated=["wudi_adam"] if extrapolated else [])


def measure_methods(shape: Shape, layer: Layer, device: str) -> Timing:
    """Every method of the package with its defaults, as mergekit calls it."""

    def merging(name: str) -> Callable[[], object]:
        return lambda: merge_tensors([layer.base, *layer.experts], name, base_index=0, name=shape.name)

    runs = {method.name: merging(method.name) for method in METHODS}
    return timing("methods", shape, layer, race(runs, rounds=3, patience=PATIENCE, device=device))


def timing(
    study: str,
    shape: Shape,
    layer: Layer,
    seconds: Mapping[str, list[float]],
    *,
    errors: Mapping[str, float] | None = None,
    extrapolated: list[str] | None = None,
) -> Timing:
    rounded = {name: [round(value, 5) for value in values] for name, values in seconds.items()}
    return Timing(
        study=study,
        model=shape.model,
        m=shape.m,
        n=shape.n,
        experts=len(layer.experts),
        seconds=rounded,
        errors=dict(errors or {}),
        extrapolated=extrapolated or [],
    )


def measure_memory(shape: Shape, branch: str, device: str) -> list[Memory]:
    counts = sorted({FEW, fewest_by_the_same_route(shape.m, shape.n), MANY})
    return [memory(shape, experts, branch, peak_and_seconds(shape, experts, branch, device)[0]) for experts in counts]


def memory(shape: Shape, experts: int, branch: str, peak: int) -> Memory:
    bound = documented_bound(shape, experts)
    return Memory(study=branch, model=shape.model, m=shape.m, n=shape.n, experts=experts, peak=peak, bound=bound)


def measure_alone(shape: Shape, experts: int, device: str) -> tuple[Timing, Memory]:
    """Our default once, without contenders, for layers that those would take an hour for."""
    peak, seconds = peak_and_seconds(shape, experts, "default", device)
    row = Timing(
        study="alone",
        model=shape.model,
        m=shape.m,
        n=shape.n,
        experts=experts,
        seconds={"default": [round(seconds, 5)]},
    )
    return row, memory(shape, experts, "default", peak)


def fewest_by_the_same_route(m: int, n: int) -> int:
    """The fewest experts that are solved as many are: fewer rows than inputs take less memory by another route."""
    return next(
        experts for experts in range(FEW, MANY + 1) if by_stacked_rows(m, n, experts) == by_stacked_rows(m, n, MANY)
    )


def targets(record: Record, device: str) -> list[Target]:
    """The numbers to reach, and what the record says of them."""
    named = {(shape.m, shape.n) for shape in TABLE}

    def speedups(branch: str) -> list[float]:
        return [row.ratio("literal", "ours") for row in of_table(branch)]

    def of_table(branch: str) -> list[Timing]:
        rows = [row for row in record.timings if row.study == branch and row.experts == SEVERAL]
        return [row for row in rows if (row.m, row.n) in named]

    compared = [row for row in record.timings if "literal" in row.seconds]
    errors = [row.errors["ours"] / row.errors["literal"] for row in record.timings if row.errors]
    peaks = {row.key: row.peak for row in record.memory}
    fewest = {row.key: (*row.key[:-1], fewest_by_the_same_route(row.m, row.n)) for row in record.memory}
    growth = [peaks[key] / peaks[fewest[key]] for key in peaks if key[-1] == MANY and fewest[key] in peaks]
    overrun = [row.peak / row.bound for row in record.memory]
    mean = geometric_mean
    speed = [
        Target(
            what=f"literal / ours, heterogeneous, geometric mean over the {len(named)} shapes, {SEVERAL} experts",
            limit=10 if device == "cuda" else 2.5,
            at_least=True,
            value=mean(speedups("heterogeneous")),
        )
    ]
    if device != "cuda":
        floors = [row.ratio("ours", "floor") for row in of_table("homogeneous")]
        speed += [
            Target(
                what="literal / ours, homogeneous, likewise",
                limit=1.4,
                at_least=True,
                value=mean(speedups("homogeneous")),
            ),
            Target(what="ours / floor, homogeneous, likewise", limit=1.3, value=mean(floors)),
        ]
    slowest = min((row.ratio("literal", "ours") for row in compared), default=None)
    return [
        *speed,
        Target(what="literal / ours, slowest of all cases", limit=1, at_least=True, value=slowest),
        Target(
            what="error of ours / of the literal steps, worst of all cases", limit=1, value=max(errors, default=None)
        ),
        Target(
            what=f"peak memory with {MANY} experts / with the fewest by the same route, worst",
            limit=1.1,
            value=max(growth, default=None),
        ),
        Target(what="peak memory / documented bound, worst", limit=1, value=max(overrun, default=None)),
    ]


def report(record: Record, device: str) -> str:
    """The whole record as a page of markdown."""
    parts = ["# Layer solver\n", environment_line(record), targets_table(targets(record, device))]
    notes = {
        "homogeneous": "Homogeneous branch",
        "heterogeneous": "Heterogeneous branch",
        "adapters, homogeneous": "Adapters of rank 16 in float32, homogeneous branch",
        "adapters, heterogeneous": "Adapters of rank 16 in float32, heterogeneous branch",
    }
    for study, title in notes.items():
        if rows := in_order(row for row in record.timings if row.study == study):
            parts += [f"## {title}\n", branches_table(rows)]
    if rows := in_order(row for row in record.timings if row.errors):
        parts += ["## Relative error of the merged task vector, against the literal steps in float64\n"]
        parts += [errors_table(rows)]
    if rows := in_order(row for row in record.timings if row.study == "peers"):
        title = f"## Peers, plainly written in float32; WUDI with {ADAM_STEPS} Adam steps, ~ extrapolated from fewer\n"
        parts += [title, contest_table(rows, to="ours")]
    if rows := in_order(row for row in record.timings if row.study == "methods"):
        parts += ["## The methods of this package with their defaults, as mergekit calls them\n"]
        parts += [contest_table(rows, to=None)]
    if rows := in_order(row for row in record.timings if row.study == ON_REQUEST):
        parts += ["## The default of `ace`, once, in a process of its own\n", contest_table(rows, to=None)]
    if record.memory:
        parts += ["## Peak memory of a layer's merge beyond its inputs\n", memory_table(record)]
    return "\n".join(parts)


def in_order(rows: Iterable[Timing]) -> list[Timing]:
    places = {(shape.m, shape.n): place for place, shape in enumerate((*SMALL, *LARGE))}
    return sorted(rows, key=lambda row: (places.get((row.m, row.n), math.inf), row.m, row.n, row.experts))


@click.command(help=__doc__)
@click.option("--shapes", metavar="MxN", multiple=True, help="Only these layers; may be repeated.")
@click.option("--experts", type=int, multiple=True, help=f"Of the branches; may be repeated. [default: {EXPERTS}]")
@click.option(
    "--study",
    type=click.Choice([*STUDIES, ON_REQUEST]),
    multiple=True,
    help=f"Only these; may be repeated. [default: all but {ON_REQUEST}]",
)
@click.option("--quick", is_flag=True, help="Without the Llama shapes, and without 20 experts.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS, show_default="benchmarks/results")
def main(
    shapes: tuple[str, ...],
    experts: tuple[int, ...],
    study: tuple[str, ...],
    quick: bool,
    device: str,
    results: Path,
) -> None:
    """See the module's docstring."""
    if device == "cuda" and not torch.cuda.is_available():
        click.echo("no CUDA device on this machine: nothing was measured")
        return
    try:
        chosen = [parse_shape(text) for text in shapes] or [*SMALL, *(() if quick else LARGE)]
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    counts = experts or (EXPERTS[:-1] if quick else EXPERTS)
    studies = study or STUDIES
    stem = "solver" if device == "cpu" else f"solver-{device}"
    record = Record.load(results / f"{stem}.json")
    record.environment = machine(device)
    mergekit_ace.register()

    def keep(row: Timing | Memory) -> None:
        record.add(row)
        record.save(results / f"{stem}.json")
        (results / f"{stem}.md").write_text(report(record, device), encoding="utf-8")
        click.echo(told(row))

    warm_up = fine_tuned(Shape(model="warm-up", m=64, n=48), 3, device)
    for branch in BRANCHES:
        contenders.ours(warm_up, branch)()
        contenders.literal(warm_up, branch)()
    for shape in chosen:
        numbers = (counts[0],) if shape in LARGE else counts
        several = numbers[-1] if shape in LARGE else SEVERAL
        if "branches" in studies:
            for number in numbers:
                layer = fine_tuned(shape, number, device)
                for branch in BRANCHES:
                    keep(measure_branch(branch, shape, layer, branch, device))
        if "errors" in studies:
            for number in numbers:
                layer = fine_tuned(shape, number, device)
                for branch in BRANCHES:
                    found = contenders.errors(layer, branch)
                    keep(timing(f"errors, {branch}", shape, layer, {}, errors=found))
        if "adapters" in studies:
            layer = adapted(shape, several, device)
            for branch in BRANCHES:
                keep(measure_branch(f"adapters, {branch}", shape, layer, branch, device))
        if "errors" in studies:
            layer = adapted(shape, several, device)
            for branch in BRANCHES:
                found = contenders.errors(layer, branch)
                keep(timing(f"errors, adapters, {branch}", shape, layer, {}, errors=found))
        if {"peers", "methods"} & set(studies):
            layer = fine_tuned(shape, several, device)
            if "peers" in studies:
                keep(measure_peers(shape, layer, device))
            if "methods" in studies:
                keep(measure_methods(shape, layer, device))
        if ON_REQUEST in studies:
            for number in numbers:
                for row in measure_alone(shape, number, device):
                    keep(row)
        if "memory" in studies:
            if measurable(device):
                for branch in contenders.OPTIONS:
                    for measured in measure_memory(shape, branch, device):
                        keep(measured)
            else:
                click.echo("peak memory is measured on Linux or on a GPU only: left out")
    click.echo(report(record, device))


def told(row: Timing | Memory) -> str:
    """A row in one line, while it is waited for."""
    place = f"{row.study}, {row.m}x{row.n}, {row.experts} experts:"
    if isinstance(row, Memory):
        return f"{place} {row.peak / 2**20:.0f} MiB"
    told = [f"{name} {row.best(name):.3g} s" for name in row.seconds]
    return f"{place} " + ", ".join(told + [f"{name} {error:.1e}" for name, error in row.errors.items()])


if __name__ == "__main__":
    main()
