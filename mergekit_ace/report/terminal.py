"""The summary of a report as a terminal shows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from mergekit_ace.printable import printable
from mergekit_ace.recipe.findings import Finding
from mergekit_ace.report.advice import advise
from mergekit_ace.report.model import Report
from mergekit_ace.report.naming import from_layer, short_names
from mergekit_ace.report.summary import Summary, gate_statistic, highest_loss, mean_loss, summarize
from mergekit_ace.report.wording import MEANING, number, optional, percent

_COLOURS = {"error": "bold red", "warning": "yellow", "hint": "cyan"}
_PADDING = 2
_NARROWEST_NAME = 16
_UNLIMITED = 10_000


class _Column(NamedTuple):
    """A column of a table and how much it matters: where the terminal is narrow, the highest numbers are left out."""

    title: str
    cells: Sequence[str | Text]
    rank: int = 0
    is_number: bool = True


def print_summary(report: Report, console: Console) -> None:
    """Treatments, experts, the tensors of highest loss, and what to act on."""
    summary = summarize(report)
    parts = [_title(report, summary), _treatments(summary), _experts(summary, report, console)]
    if summary.estimates:
        parts.append(_estimates(summary, console))
    if summary.ranked:
        parts.append(_ranked(summary, report, console))
    for part in parts:
        console.print(part)
        console.print()
    print_findings(advise(report), console)


def print_findings(findings: Sequence[Finding], console: Console) -> None:
    """One finding after the other, each with its remedy below it."""
    for finding in findings:
        line = Text(f"{finding.level}: ", style=_COLOURS[finding.level])
        line.append(printable(finding.what), style="not bold default")
        console.print(line, soft_wrap=True)
        console.print(Text(f"    {printable(finding.remedy)}", style="dim"), soft_wrap=True)


def _title(report: Report, summary: Summary) -> Text:
    # Text and never markup: a name from a checkpoint may hold square brackets, as every slice of a stack does.
    text = Text(printable(report.recipe), style="bold")
    text.append(
        f"  {report.method}, {len(report.experts)} experts, {len(report.tensors)} tensors, {report.mode} pass, "
        f"{summary.seconds:.1f} s",
        style="not bold",
    )
    if not report.complete:
        text.append("  interrupted", style="yellow")
    for note in (report.selection, report.note):
        if note:
            text.append(f"\n{printable(note)}", style="not bold dim")
    return text


def _treatments(summary: Summary) -> Table:
    table = _table()
    table.add_column("tensors", justify="right", no_wrap=True)
    table.add_column("treatment", no_wrap=True)
    table.add_column("")
    for name, count in summary.treatments.items():
        table.add_row(str(count), Text(name, style="red" if name == "failed" else ""), Text(MEANING[name], style="dim"))
    return table


def _experts(summary: Summary, report: Report, console: Console) -> Table:
    short = short_names(report.experts)
    experts = summary.experts
    marks = {}
    if summary.highest_loss is not None and summary.lowest_loss is not None:
        marks = {summary.highest_loss.expert: "highest", summary.lowest_loss.expert: "lowest"}
    columns = [
        _Column("tensors changed", [str(expert.tensors) for expert in experts], 3),
        _Column("update norm", [number(expert.norm) for expert in experts], 2),
        _Column("share of energy", [percent(expert.energy_share) for expert in experts], 1),
    ]
    if any(expert.loss is not None for expert in experts):
        columns.append(_Column("loss", [optional(expert.loss) for expert in experts]))
        columns.append(_Column("", [marks.get(expert.expert, "") for expert in experts], is_number=False))
    if any(expert.measured_loss is not None for expert in experts):
        columns.insert(-1, _Column("measured loss", [optional(expert.measured_loss) for expert in experts]))
    return _fitted("expert", [short[expert.expert] for expert in experts], columns, console)


def _estimates(summary: Summary, console: Console) -> Table:
    columns = [
        _Column("correlation", [number(estimate.correlation) for estimate in summary.estimates]),
        _Column("matrices", [str(estimate.matrices) for estimate in summary.estimates], 1),
    ]
    return _fitted("estimates against measured", [estimate.kind for estimate in summary.estimates], columns, console)


def _ranked(summary: Summary, report: Report, console: Console) -> Table:
    short = short_names(report.experts)
    tensors = summary.ranked
    highest = [highest_loss(tensor) for tensor in tensors]
    candidates = [
        _Column("loss", [optional(mean_loss(tensor)) for tensor in tensors]),
        _Column("highest for", [printable(short[e.expert]) if e else "" for e in highest], 1, is_number=False),
        _Column("heterogeneity", [optional(gate_statistic(tensor)) for tensor in tensors], 4),
        _Column("ridge", [optional(tensor.merge.ridge if tensor.merge else None) for tensor in tensors], 2),
        _Column("condition", [optional(tensor.merge.condition if tensor.merge else None) for tensor in tensors], 3),
    ]
    columns = [column for column in candidates if any(column.cells)]
    what = "loss" if any(mean_loss(tensor) is not None for tensor in tensors) else "heterogeneity"
    return _fitted(f"tensors of highest {what}", [from_layer(tensor.name) for tensor in tensors], columns, console)


def _fitted(title: str, names: Sequence[str], columns: Sequence[_Column], console: Console) -> Table:
    """A table whose names are whole: in a narrow terminal columns are left out, and then names end after a dot."""
    kept = list(columns)
    shown = [printable(name) for name in names]
    while True:
        table = _filled(title, shown, kept)
        missing = Measurement.get(console, console.options.update(max_width=_UNLIMITED), table).maximum - console.width
        if missing <= 0:
            return table
        if not any(column.rank for column in kept):
            break
        kept.remove(max(kept, key=lambda column: column.rank))
    width = max(_NARROWEST_NAME, max(map(len, [title, *shown])) - missing)
    return _filled(title, [after_dots(name, width) for name in shown], kept)


def _filled(title: str, names: Sequence[str], columns: Sequence[_Column]) -> Table:
    table = _table()
    table.add_column(title, no_wrap=True)
    for column in columns:
        table.add_column(column.title, justify="right" if column.is_number else "left", no_wrap=True)
    for row, name in enumerate(names):
        table.add_row(Text(name), *(Text(str(column.cells[row])) for column in columns))
    return table


def after_dots(name: str, width: int) -> str:
    """The name on several lines, broken after its dots; a part of it that is longer than `width` stays whole."""
    lines = [""]
    for part in name.replace(".", ".\n").split("\n"):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _table() -> Table:
    return Table(box=None, pad_edge=False, header_style="bold", padding=(0, _PADDING, 0, 0))
