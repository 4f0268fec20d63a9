"""A record as markdown."""

from collections.abc import Iterable

from benchmarks.experiment.tables import markdown
from benchmarks.speed.record import Record, Target, Timing


def environment_line(record: Record) -> str:
    return "Measured with " + ", ".join(f"{name} {value}" for name, value in record.environment.items()) + ".\n"


def targets_table(targets: Iterable[Target]) -> str:
    lines = []
    for target in targets:
        value = "not measured" if target.value is None else f"{target.value:.3g}"
        verdict = {True: "yes", False: "no", None: ""}[target.met]
        lines.append([target.what, f"{'>=' if target.at_least else '<='} {target.limit:g}", value, verdict])
    return markdown(["target", "limit", "measured", "met"], lines)


def seconds(timing: Timing, name: str) -> str:
    """The best round; `~` before what was extrapolated."""
    if name not in timing.seconds:
        return ""
    return f"{'~' if name in timing.extrapolated else ''}{timing.best(name):.3g}"


def ratio(timing: Timing, name: str, to: str) -> str:
    return f"{timing.ratio(name, to):.2f}" if {name, to} <= timing.seconds.keys() else ""


def layer_cells(row: Timing) -> list[str]:
    return [row.model, f"{row.m}x{row.n}", str(row.experts)]


def branches_table(timings: list[Timing]) -> str:
    """Ours, the literal steps and the floor: best seconds, medians of the ratios in a round."""
    lines = [
        [
            *layer_cells(row),
            *(seconds(row, name) for name in ("ours", "literal", "floor")),
            ratio(row, "literal", "ours"),
            ratio(row, "ours", "floor"),
        ]
        for row in timings
    ]
    header = ["model", "layer", "experts", "ours, s", "literal, s", "floor, s", "literal / ours", "ours / floor"]
    return markdown(header, lines)


def errors_table(timings: list[Timing]) -> str:
    lines = [
        [
            *layer_cells(row),
            row.study.removeprefix("errors, "),
            *(f"{row.errors[name]:.1e}" for name in ("ours", "literal")),
            f"{row.errors['ours'] / row.errors['literal']:.2f}",
        ]
        for row in timings
    ]
    return markdown(["model", "layer", "experts", "branch", "ours", "literal float32", "ours / literal"], lines)


def contest_table(timings: list[Timing], *, to: str | None) -> str:
    """Best seconds of every contender, with its ratio to one of them."""
    names = list(dict.fromkeys(name for row in timings for name in row.seconds))

    def cell(row: Timing, name: str) -> str:
        text = seconds(row, name)
        return f"{text} ({ratio(row, name, to)}x)" if to and text and name != to else text

    lines = [[*layer_cells(row), *(cell(row, name) for name in names)] for row in timings]
    return markdown(["model", "layer", "experts", *(f"{name}, s" for name in names)], lines)


def memory_table(record: Record) -> str:
    lines = [
        [
            row.model,
            row.study,
            f"{row.m}x{row.n}",
            str(row.experts),
            f"{row.peak / 2**20:.0f}",
            f"{row.peak / (4 * row.m * row.n):.1f}",
            f"{row.peak / (4 * row.n * row.n):.1f}",
            f"{row.peak / row.bound:.2f}",
        ]
        for row in record.memory
    ]
    return markdown(["model", "branch", "layer", "experts", "peak, MiB", "in m n", "in n n", "of the bound"], lines)


def runs_table(record: Record, to: str) -> str:
    """Whole runs: best seconds, median ratio to one recipe, highest peaks."""
    lines = []
    for run in record.runs:
        against = next((r for r in record.runs if r.recipe == to and r.key[:2] == run.key[:2]), None)
        peaks = [max(run.peak_rss), max(run.peak_anonymous), max(run.peak_device)]
        lines.append(
            [
                run.checkpoint,
                str(run.layers),
                run.recipe,
                f"{min(run.seconds):.1f}",
                f"{run.ratio(against):.2f}" if against else "",
                f"{min(run.cpu_seconds):.1f}",
                f"{run.cpu_ratio(against):.2f}" if against else "",
                *(f"{peak / 1e9:.2f}" for peak in peaks),
            ]
        )
    header = ["checkpoints", "layers", "recipe", "seconds", f"to {to}", "CPU s", f"CPU to {to}", "peak RSS, GB"]
    return markdown([*header, "its own memory, GB", "device, GB"], lines)
