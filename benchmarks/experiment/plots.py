"""Results as pictures: a bar a setting, and accuracy against the published ridge."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt

from .results import Results
from .tables import has_fixed_ridge, in_order

COLOURS = {
    "mergekit": "#9aa5b1",
    "ace": "#c2410c",
    "ace published": "#f4a261",
    "family": "#2a6f97",
    "with prompts": "#6b4c9a",
}
STYLE: dict[Any, object] = {
    "svg.hashsalt": "mergekit-ace",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
# what is drawn across the panels: label, name, colour, dash
LEVELS = (
    ("ace published auto", "published, automatic", COLOURS["ace published"], "--"),
    ("ace", "ace defaults", COLOURS["ace"], "-"),
    ("average", "average", "#52606d", ":"),
)
METADATA = {"Date": None}


def draw_bars(results: Results, path: Path) -> None:
    """Mean accuracy relative to the experts of every setting, with its standard error."""
    rows = in_order(results.rows)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7, 0.9 + 0.24 * len(rows)), layout="constrained")
        means = [row.relative_mean for row in rows]
        axes.barh(
            range(len(rows)),
            means,
            xerr=[row.standard_error or 0 for row in rows],
            color=[COLOURS.get(row.group, "#9aa5b1") for row in rows],
            error_kw={"linewidth": 0.8},
        )
        axes.set_yticks(range(len(rows)), [row.label for row in rows])
        axes.invert_yaxis()
        for place, mean in enumerate(means):
            axes.annotate(f"{mean:.1f}", (0, place), xytext=(4, 0), textcoords="offset points", va="center", size=8)
        axes.axvline(100, color="black", linewidth=0.8, linestyle=":")
        axes.set_xlabel("mean accuracy relative to the experts, percent")
        axes.set_title(results.suite)
        figure.savefig(path, metadata=METADATA)
        plt.close(figure)


def draw_epsilon(suites: list[Results], path: Path) -> bool:
    """Accuracy of the published method against its ridge, a panel a suite; other settings as lines.

    Returns whether there was anything to draw.
    """
    shown = [suite for suite in suites if any(has_fixed_ridge(row) for row in suite.rows)]
    if not shown:
        return False
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            lines, columns, figsize=(3.6 * columns, 2.7 * lines), layout="constrained", squeeze=False
        )
        for axes in panels.flat[len(shown) :]:
            axes.set_axis_off()
        for axes, suite in zip(panels.flat, shown, strict=False):
            points = sorted(
                (float(row.parameters["epsilon"]), row.relative_mean) for row in suite.rows if has_fixed_ridge(row)
            )
            axes.semilogx(
                *zip(*points, strict=True), marker="o", color=COLOURS["ace published"], label="published, fixed"
            )
            levels = {row.label: row.relative_mean for row in suite.rows}
            for label, name, colour, dash in LEVELS:
                if label in levels:
                    axes.axhline(levels[label], color=colour, linestyle=dash, label=name)
            axes.set_title(suite.suite)
            axes.set_xlabel("epsilon")
            axes.set_ylabel("relative to experts, %")
        figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(path, metadata=METADATA)
        plt.close(figure)
    return True
