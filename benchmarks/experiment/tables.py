"""Results as markdown."""

from collections.abc import Iterable

from .results import Results, Row
from .settings import SETTINGS

ORDER = {setting.label: place for place, setting in enumerate(SETTINGS)}


def in_order(rows: Iterable[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (ORDER.get(row.label, len(ORDER)), row.label))


def markdown(header: list[str], lines: list[list[str]]) -> str:
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *lines]) + "\n"


def suite_table(results: Results) -> str:
    """One suite: every setting's mean relative to the experts and its accuracy on each task, in percent."""
    tasks = list(results.experts)

    def line(label: str, mean: str, accuracies: dict[str, float], seconds: str) -> list[str]:
        return [label, mean, *(f"{100 * accuracies[task]:.1f}" for task in tasks), seconds]

    lines = [line("*experts*", "100.0", results.experts, "")]
    base_mean = 100 * sum(results.base[task] / results.experts[task] for task in tasks) / len(tasks)
    lines.append(line("*base*", f"{base_mean:.1f}", results.base, ""))
    for row in in_order(results.rows):
        error = "" if row.standard_error is None else f" ± {row.standard_error:.1f}"
        lines.append(line(row.label, f"{row.relative_mean:.1f}{error}", row.accuracies, f"{row.seconds:.1f}"))
    lines += [[label, "fails", *("" for _ in tasks), ""] for label in results.failures]
    return markdown(["method", "relative mean", *tasks, "merge, s"], lines)


def summary_table(suites: list[Results]) -> str:
    """All suites: the mean relative to the experts in percent, a setting a line."""
    labels = [row.label for row in in_order({row.label: row for suite in suites for row in suite.rows}.values())]
    found = [{row.label: row.relative_mean for row in suite.rows} for suite in suites]
    grids = [[row.relative_mean for row in suite.rows if has_fixed_ridge(row)] for suite in suites]
    lines = [[label, *(f"{means[label]:.1f}" if label in means else "" for means in found)] for label in labels]
    lines.append(["*best of the published grid*", *(f"{max(grid):.1f}" if grid else "" for grid in grids)])
    return markdown(["method", *(suite.suite for suite in suites)], lines)


def has_fixed_ridge(row: Row) -> bool:
    """Whether the row is the published method with a fixed ridge, not an estimated one."""
    return row.group == "ace published" and isinstance(row.parameters.get("epsilon"), float)
