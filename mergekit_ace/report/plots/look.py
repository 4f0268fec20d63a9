"""The look that all figures share: colours, fonts, axes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from mergekit_ace.printable import printable

# Okabe and Ito's colours, distinct for any colour vision; then matplotlib's own for more experts than that.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999933", "#882255")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h", "p")
INK = "#30343b"
_STYLE: Mapping[Any, Any] = {
    "axes.edgecolor": "#9aa0a8",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "axes.titlecolor": INK,
    "axes.axisbelow": True,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "grid.color": "#e6e8eb",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "savefig.dpi": 200,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,  # names come from checkpoints, and a dollar sign is not a formula
    "xtick.color": INK,
    "ytick.color": INK,
}
# 4.6 times 200 is less than 920 in floating point, and an older matplotlib cuts the rest off.
WIDTH = 4.6001
"""Inches. The width of a phone at a point a pixel, so that the text of a picture is as large there as it is set."""
MOST_ENTRIES = 12
"""Of a legend."""
LEGEND_COLUMNS = 2


@contextmanager
def style() -> Iterator[None]:
    """The look of all figures; also needed while one is saved."""
    with mpl.rc_context(dict(_STYLE)), warnings.catch_warnings():
        # A name may be in any script, and the browser will have the letters that matplotlib's font lacks.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        yield


def new_axes(height: float) -> tuple[Figure, Axes]:
    """A figure of one panel; the height in inches."""
    figure = Figure(figsize=(WIDTH, height))
    return figure, figure.subplots()


def logarithmic(axes: Axes, axis: str, subs: Sequence[float] = (1.0,)) -> None:
    """A logarithmic axis whose labels are plain numbers: matplotlib's own are formulas, which we do not parse."""
    if axis == "x":
        axes.set_xscale("log")
    else:
        axes.set_yscale("log")
    ticks = axes.xaxis if axis == "x" else axes.yaxis
    ticks.set_major_locator(LogLocator(subs=subs))
    ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ticks.set_minor_formatter(NullFormatter())


def whole_numbers(axes: Axes) -> None:
    """Only whole numbers under the horizontal axis: layers are counted."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def colour_of(index: int) -> str:
    """Of one expert or layer type, the same in every figure of a report."""
    return _COLOURS[index] if index < len(_COLOURS) else f"C{index % 10}"


def clip(text: str, most: int = 24) -> str:
    """The end of a name is what tells it from others."""
    text = printable(text)
    return text if len(text) <= most else f"…{text[1 - most :]}"
