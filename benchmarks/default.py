"""The default of `ace` on single matrices: seconds against the literal steps and peers, and the error of its output.

python -m benchmarks.default [--shapes MxN:EXPERTS]... [--dtype float32|bfloat16]...
python -m benchmarks.default --checkpoints [--every N] BASE EXPERT [EXPERT ...]

Seconds are those of the processor, of all threads: set OMP_NUM_THREADS=1, and other processes do not count. Contenders
take turns. The error is that of the merged weights before they are rounded, against the same merge in float64, over the
error that rounding them adds: at most an eighth for weights of 16 bits. With `--checkpoints` it is measured on every
matrix of real models.
"""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch
from safetensors import safe_open

from benchmarks.experiment.tables import markdown
from benchmarks.speed import contenders
from benchmarks.speed.layers import Layer, fine_tuned, parse_shape
from benchmarks.speed.record import Record, Target, Timing, geometric_mean, machine
from benchmarks.speed.tables import contest_table, environment_line, targets_table
from benchmarks.speed.timing import race
from mergekit_ace.matrix.expert import Expert
from mergekit_ace.matrix.merge import MatrixMerge, merge_by_covariance
from mergekit_ace.matrix.presets import ACE
from mergekit_ace.matrix.stored_task_vectors import StoredTaskVectors
from mergekit_ace.tensor_treatment import treatment

RESULTS = Path(__file__).parent / "results"
SHAPES = ("2304x768:7", "768x3072:7", "1024x1024:8", "3072x1024:4")
"""Tall, wide and square, of GPT-2 and ViT-L/14."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PEERS = ("tsv_m", "iso_cts", "swudi")
LIMITS = {"float32": 2.5, "bfloat16": 4.0}
ROUNDS, PATIENCE = 5, 20.0


@dataclass(frozen=True, kw_only=True)
class OutputError:
    """Of one merged matrix."""

    name: str
    shape: tuple[int, int]
    error: float
    """`||.||_F` before rounding, over that of rounding."""
    how: str
    """Dtypes of products and eigendecomposition."""


def merge(layer: Layer, *, dtype: torch.dtype | None = None) -> MatrixMerge:
    """By default, of what the layer holds, or of the same numbers in another dtype."""
    base, *tensors = (tensor if dtype is None else tensor.to(dtype) for tensor in (layer.base, *layer.experts))
    return merge_by_covariance(
        StoredTaskVectors(base, [Expert(name=str(t), tensor=x) for t, x in enumerate(tensors)]), ACE
    )


def output_error(name: str, layer: Layer) -> OutputError:
    merged, exact = merge(layer), merge(layer, dtype=torch.float64).task_vector
    weights = layer.base.double() + exact
    rounding = float((weights.to(layer.base.dtype).double() - weights).norm())
    how = f"products {merged.products or 'float32'}, eigenvectors {merged.eigendecomposition or 'none'}"
    m, n = layer.base.shape
    error = float((merged.task_vector.double() - exact).norm())
    return OutputError(name=name, shape=(m, n), error=error / rounding if rounding else 0.0, how=how)


def stored(layer: Layer, dtype: torch.dtype) -> Layer:
    return Layer(base=layer.base.to(dtype), experts=tuple(expert.to(dtype) for expert in layer.experts))


def measure(text: str, dtype: str) -> tuple[Timing, OutputError]:
    """One layer, `MxN:EXPERTS`."""
    place, _, count = text.partition(":")
    shape, experts = parse_shape(place), int(count or 3)
    layer = stored(fine_tuned(shape, experts), DTYPES[dtype])
    runs = {"default": lambda: merge(layer), "literal": contenders.literal(layer, "heterogeneous")}
    runs |= {name: contenders.peer(layer, name) for name in PEERS if name != "swudi"}
    runs["swudi"] = contenders.swudi(layer)
    found = race(runs, rounds=ROUNDS, patience=PATIENCE, clock=time.process_time)
    seconds = {name: [round(value, 4) for value in values] for name, values in found.items()}
    row = Timing(study=dtype, model=shape.model, m=shape.m, n=shape.n, experts=experts, seconds=seconds)
    return row, output_error(shape.name, layer)


def real_layers(base: Path, experts: tuple[Path, ...], every: int) -> Iterator[tuple[str, Layer]]:
    """One of so many matrices that the default merges, of folders with one file each; float32 is cast to bfloat16."""
    files = [safe_open(folder / "model.safetensors", "pt") for folder in (base, *experts)]
    shapes = {name: files[0].get_slice(name).get_shape() for name in files[0].keys()}  # noqa: SIM118 (no mapping)
    matrices = [name for name, shape in shapes.items() if treatment(name, shape).kind == "matrix"]
    for name in matrices[::every]:
        ours, *theirs = (file.get_tensor(name) for file in files)
        dtype = torch.bfloat16 if ours.dtype == torch.float32 else ours.dtype
        yield name, stored(Layer(base=ours, experts=tuple(theirs)), dtype)


def errors_table(rows: list[OutputError]) -> str:
    lines = [[row.name, "x".join(map(str, row.shape)), f"{row.error:.4f}", row.how] for row in rows]
    return markdown(["matrix", "shape", "error / rounding", "how"], lines)


def targets(record: Record) -> list[Target]:
    found = []
    for dtype, limit in LIMITS.items():
        rows = [row for row in record.timings if row.study == dtype]
        value = geometric_mean([row.ratio("literal", "default") for row in rows])
        what = f"literal / default, {dtype} in and out, geometric mean of tall, wide and square"
        found.append(Target(what=what, limit=limit, at_least=True, value=value))
    slowest = min((row.ratio("literal", "default") for row in record.timings), default=None)
    found.append(Target(what="literal / default, slowest of all cases", limit=1, at_least=True, value=slowest))
    for peer in PEERS:
        # A record holds rows of earlier runs until theirs are measured again, and those may lack a peer.
        value = geometric_mean([row.ratio(peer, "default") for row in record.timings if peer in row.seconds])
        found.append(Target(what=f"{peer} / default, geometric mean", limit=3, at_least=True, value=value))
    errors = [row.errors["output"] for row in record.timings if "output" in row.errors and row.study == "bfloat16"]
    what = "error before rounding / rounding error, bfloat16, worst layer"
    found.append(Target(what=what, limit=1 / 8, value=max(errors, default=None)))
    return found


def report(record: Record) -> str:
    parts = ["# The default on single matrices\n", environment_line(record), targets_table(targets(record))]
    for dtype in DTYPES:
        if rows := [row for row in record.timings if row.study == dtype]:
            parts += [f"## Seconds of the processor, {dtype} in and out\n", contest_table(rows, to="default")]
    return "\n".join(parts)


@click.command(help=__doc__)
@click.option("--shapes", metavar="MxN:EXPERTS", multiple=True, default=SHAPES, show_default=True)
@click.option("--dtype", "dtypes", type=click.Choice(list(DTYPES)), multiple=True, default=tuple(DTYPES))
@click.option("--checkpoints", is_flag=True, help="Measure the error on the folders that follow.")
@click.option("--every", type=click.IntRange(min=1), default=1, help="Of the models' matrices. [default: 1, all]")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS, show_default="benchmarks/results")
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path, exists=True))
@torch.no_grad()
def main(
    shapes: tuple[str, ...],
    dtypes: tuple[str, ...],
    checkpoints: bool,
    every: int,
    results: Path,
    folders: tuple[Path, ...],
) -> None:
    """See the module's docstring."""
    if checkpoints:
        rows = sorted(
            (output_error(*found) for found in real_layers(folders[0], folders[1:], every)), key=lambda row: -row.error
        )
        middle = statistics.median(row.error for row in rows)
        click.echo(f"{len(rows)} matrices, error / rounding: worst {rows[0].error:.4f}, median {middle:.4f}\n")
        click.echo(errors_table(rows[:10]))
        return
    record = Record.load(results / "default.json")
    record.environment = machine("cpu")
    for dtype in dtypes:
        for text in shapes:
            row, error = measure(text, dtype)
            record.add(replace(row, errors={"output": round(error.error, 5)}))
            record.save(results / "default.json")
            (results / "default.md").write_text(report(record), encoding="utf-8")
            click.echo(f"{dtype} {text}: {row.seconds} {error}")
    click.echo(report(record))


if __name__ == "__main__":
    main()
