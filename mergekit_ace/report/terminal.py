"""The summary of a report as a terminal shows it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from mergekit_ace.printable import printable
from mergekit_ace.recipe.findings import Finding
from mergekit_ace.report.advice import advise
from mergekit_ace.report.model import LayerReport, Report
from mergekit_ace.report.naming import from_layer, short_names
from mergekit_ace.report.summary import Summary, gate_statistic, mean_loss, summarize
from mergekit_ace.report.wording import BRANCH_MEANING, number, percent

_COLOURS = {"error": "bold red", "warning": "yellow", "hint": "cyan"}


def print_summary(report: Report, console: Console) -> None:
    """Branches, experts, worst layers and what to act on."""
    summary = summarize(report)
    parts: list[RenderableType] = [_title(report, summary), _branches(summary), _experts(summary, report)]
    if summary.worst:
        parts.append(_worst(summary.worst, report.experts))
    console.print(Group(*(part for pair in ((part, Text()) for part in parts) for part in pair)))
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
        f"  {report.method}, {len(report.experts)} experts, {len(report.layers)} tensors, {report.mode} pass, "
        f"{summary.seconds:.1f} s",
        style="not bold",
    )
    if not report.complete:
        text.append("  interrupted", style="yellow")
    if report.note:
        text.append(f"\n{report.note}", style="not bold dim")
    return text


def _branches(summary: Summary) -> Table:
    table = _table(("tensors", "right"), ("branch", "left"), ("", "left"))
    for branch, count in summary.branches.items():
        style = "red" if branch == "failed" else ""
        table.add_row(str(count), Text(branch, style=style), Text(BRANCH_MEANING[branch], style="dim"))
    return table


def _experts(summary: Summary, report: Report) -> Table:
    short = short_names(report.experts)
    table = _table(("expert", "left"), ("changed", "right"), ("norm", "right"), ("trace", "right"), ("loss", "right"))
    for expert in summary.experts:
        mark = ""
        if summary.most_hurt is not summary.least_hurt:
            mark = {summary.most_hurt: " most hurt", summary.least_hurt: " least hurt"}.get(expert, "")
        table.add_row(
            Text(printable(short[expert.expert])),
            str(expert.layers),
            number(expert.norm),
            percent(expert.trace_share),
            Text(("" if expert.loss is None else number(expert.loss)) + mark),
        )
    return table


def _worst(layers: Iterable[LayerReport], experts: Sequence[str]) -> Table:
    short = short_names(experts)
    table = _table(
        ("worst layers", "left"),
        ("branch", "left"),
        ("heterogeneity", "right"),
        ("ridge", "right"),
        ("condition", "right"),
        ("loss", "right"),
        ("worst for", "left"),
    )
    for layer in layers:
        hurt = max((e for e in layer.experts if e.loss is not None), key=lambda e: e.loss or 0.0, default=None)
        table.add_row(
            Text(printable(from_layer(layer.name))),
            layer.branch,
            *(_optional(value) for value in (gate_statistic(layer), layer.ridge, layer.condition, mean_loss(layer))),
            Text(printable(short[hurt.expert]) if hurt else ""),
        )
    return table


def _optional(value: float | None) -> str:
    return "" if value is None else number(value)


def _table(*columns: tuple[str, str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for title, justify in columns:
        table.add_column(title, justify="right" if justify == "right" else "left", overflow="fold")
    return table
