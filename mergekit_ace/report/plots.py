"""The pictures of a report, as matplotlib figures. Nothing is measured here, and nothing written."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from mergekit_ace.report.model import ExpertReport, LayerReport, Report, Spectrum
from mergekit_ace.report.naming import short_names
from mergekit_ace.report.summary import SOLVED, badness, gate_statistic
from mergekit_ace.report.wording import printable

# Okabe and Ito's colours, told apart with any colour vision; then matplotlib's own for more experts than that.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999933", "#882255")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h", "p")
_INK = "#30343b"
_STYLE: Mapping[Any, Any] = {
    "axes.edgecolor": "#9aa0a8",
    "axes.grid": True,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "axes.titlecolor": _INK,
    "axes.axisbelow": True,
    "figure.constrained_layout.use": True,
    "font.size": 9.5,
    "grid.color": "#e6e8eb",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "savefig.dpi": 200,
    "svg.fonttype": "none",
    "text.color": _INK,
    "text.parse_math": False,  # names come from checkpoints, and a dollar sign is not a formula
    "xtick.color": _INK,
    "ytick.color": _INK,
}
_WIDTH = 6.4  # inches; narrow, so that the text is still readable on a phone
_MOST_ENTRIES = 12  # of a legend


@contextmanager
def style() -> Iterator[None]:
    """The look of all figures; also needed while one is saved."""
    with mpl.rc_context(dict(_STYLE)), warnings.catch_warnings():
        # A name may be in any script, and the browser will have the letters that matplotlib's font lacks.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        yield


def figures(report: Report) -> dict[str, Figure]:
    """Every figure that the report has numbers for, by the name of its file."""
    drawn: dict[str, Figure] = {}
    with style():
        for name, draw in FIGURES.items():
            figure = draw(report)
            if figure is not None:
                drawn[name] = figure
    return drawn


def heterogeneity_by_depth(report: Report) -> Figure | None:
    """The gate's statistic of every gated layer by its depth, one mark a layer type, with the threshold."""
    layers = [layer for layer in _solved(report) if layer.depth is not None and gate_statistic(layer) is not None]
    if not layers:
        return None
    figure, axes = _axes(3.8)
    kinds = _kinds(layers)
    for index, kind in enumerate(kinds):
        some = [layer for layer in layers if layer.kind == kind]
        axes.plot(
            [layer.depth or 0 for layer in some],
            [gate_statistic(layer) or 0.0 for layer in some],
            _MARKERS[index % len(_MARKERS)],
            color=_colour(index),
            markersize=5,
            alpha=0.85,
            label=_clip(kind) if index < _MOST_ENTRIES else None,
        )
    _log_heterogeneity(axes, "y", layers)
    _draw_thresholds(axes.axhline, layers)
    _whole_numbers(axes)
    axes.set_xlabel("layer")
    axes.set_title("Heterogeneity by depth")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def heterogeneity_by_kind(report: Report) -> Figure | None:
    """The gate's statistic of every gated layer by its layer type, with the median of each and the threshold."""
    layers = [layer for layer in _solved(report) if gate_statistic(layer) is not None]
    if not layers:
        return None
    kinds = _kinds(layers)
    figure, axes = _axes(1.2 + 0.32 * len(kinds))
    for index, kind in enumerate(kinds):
        values = sorted(gate_statistic(layer) or 0.0 for layer in layers if layer.kind == kind)
        axes.plot(values, [index] * len(values), "o", color=_colour(index), markersize=5, alpha=0.6)
        axes.plot([values[len(values) // 2]], [index], "|", color=_INK, markersize=15, markeredgewidth=1.8)
    axes.set_yticks(range(len(kinds)), [_clip(kind) for kind in kinds])
    axes.invert_yaxis()
    _log_heterogeneity(axes, "x", layers)
    _draw_thresholds(axes.axvline, layers)
    axes.set_title("Heterogeneity by layer type (bar: median)")
    return figure


def shares_by_depth(report: Report) -> Figure | None:
    """Each expert's mean share of the trace, stacked, by depth."""
    return _by_depth(report, "Expert shares by depth", "share of the trace", lambda e: e.trace_share, stacked=True)


def losses_by_depth(report: Report) -> Figure | None:
    """Each expert's mean loss by depth: 0 is nothing lost, 1 is as far as the base."""
    figure = _by_depth(report, "What the merge costs each expert, by depth", "loss", lambda e: e.loss, stacked=False)
    if figure is not None:
        axes = figure.axes[0]
        axes.axhline(1.0, color=_INK, linewidth=1, linestyle=":")
        axes.annotate("the base model", (1, 1), (0, 3), xycoords=("axes fraction", "data"), ha="right", fontsize=8,
                      textcoords="offset points")  # fmt: skip
        axes.set_ylim(bottom=0)
    return figure


def interference_matrices(report: Report) -> Figure | None:
    """Overlap of input subspaces and alignment of task vectors of every pair of experts, averaged over the layers."""
    names = report.experts
    overlap = _mean_pairs(report, "overlap")
    alignment = _mean_pairs(report, "alignment")
    if overlap is None or alignment is None:
        return None
    short = short_names(names)
    figure = Figure(figsize=(_WIDTH, 1.4 + 0.42 * len(names)))
    left, right = figure.subplots(1, 2)
    _matrix(left, overlap, [_clip(short[name]) for name in names], "Overlap of input subspaces", "Blues", 0.0)
    _matrix(right, alignment, [_clip(short[name]) for name in names], "Alignment of task vectors", "RdBu_r", -1.0)
    right.set_yticklabels([])
    return figure


def spectra(layers: Sequence[LayerReport], experts: Sequence[str]) -> Figure | None:
    """Singular values of the experts' updates and of the merged one, before and after refinement; one panel a layer."""
    layers = [layer for layer in layers if layer.merged is not None]
    if not layers:
        return None
    columns = min(2, len(layers))
    rows = math.ceil(len(layers) / columns)
    short = short_names(experts)
    figure = Figure(figsize=(_WIDTH, 0.6 + 2.5 * rows))
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel in panels.flat[len(layers) :]:
        panel.remove()
    for axes, layer in zip(panels.flat, layers, strict=False):
        _spectrum(axes, layer, {name: (_clip(short[name]), _colour(i)) for i, name in enumerate(experts)})
    known = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=4)
    return figure


def layers_to_show(report: Report, most: int = 4) -> list[LayerReport]:
    """The layers whose spectra are shown unless others are asked for: refined ones first, then the worst."""
    solved = [layer for layer in report.layers if layer.merged is not None and len(layer.experts) > 1]
    solved.sort(key=lambda layer: (layer.refined_directions is None, -badness(layer)))
    return solved[:most]


FIGURES: Mapping[str, Callable[[Report], Figure | None]] = {
    "heterogeneity-by-depth": heterogeneity_by_depth,
    "heterogeneity-by-type": heterogeneity_by_kind,
    "shares-by-depth": shares_by_depth,
    "losses-by-depth": losses_by_depth,
    "interference": interference_matrices,
    "spectra": lambda report: spectra(layers_to_show(report), report.experts),
}
"""Name of the file -> what draws it."""


def _spectrum(axes: Axes, layer: LayerReport, experts: Mapping[str, tuple[str, str]]) -> None:
    for expert in layer.experts:
        if expert.spectrum is not None:
            label, colour = experts[expert.expert]
            axes.plot(expert.spectrum.ranks, expert.spectrum.values, color=colour, linewidth=1, alpha=0.7, label=label)
    if layer.merged is not None:
        before, after = layer.merged.spectrum_before, layer.merged.spectrum
        if before is not None:
            axes.plot(before.ranks, before.values, color=_INK, linewidth=1.6, linestyle="--", label="before refinement")
        axes.plot(after.ranks, after.values, color=_INK, linewidth=2, label="merged")
    _logarithmic(axes, "x")
    _logarithmic(axes, "y")
    tops = [spectrum.values[0] for spectrum in _spectra_of(layer) if spectrum.values and spectrum.values[0] > 0]
    if tops:
        axes.set_ylim(bottom=max(tops) * 1e-3)
    axes.set_title(_clip(layer.name, 44), fontsize=9)
    axes.set_xlabel("rank")
    axes.set_ylabel("singular value")


def _spectra_of(layer: LayerReport) -> Iterator[Spectrum]:
    yield from (expert.spectrum for expert in layer.experts if expert.spectrum is not None)
    if layer.merged is not None:
        yield layer.merged.spectrum


def _by_depth(
    report: Report, title: str, label: str, value: Callable[[ExpertReport], float | None], *, stacked: bool
) -> Figure | None:
    depths = sorted({layer.depth for layer in _solved(report) if layer.depth is not None})
    means: dict[str, list[float]] = {name: [] for name in report.experts}
    for depth in depths:
        layers = [layer for layer in _solved(report) if layer.depth == depth]
        for name in report.experts:
            values = [value(e) for layer in layers for e in layer.experts if e.expert == name]
            known = [number for number in values if number is not None]
            # A stack must add up to 1: an expert that is left out of a layer has no share in it.
            count = len(layers) if stacked else len(known)
            means[name].append(sum(known) / count if known else (0.0 if stacked else math.nan))
    if not depths or all(math.isnan(number) for series in means.values() for number in series):
        return None
    short = short_names(report.experts)
    labels = [_clip(short[name]) for name in report.experts]
    colours = [_colour(index) for index in range(len(labels))]
    figure, axes = _axes(3.3)
    if stacked:
        base = [0.0] * len(depths)
        for name, text, colour in zip(report.experts, labels, colours, strict=True):
            axes.bar(depths, means[name], 0.85, bottom=base, color=colour, label=text)
            base = [low + high for low, high in zip(base, means[name], strict=True)]
        axes.set_ylim(0, 1)
    else:
        for index, (name, text, colour) in enumerate(zip(report.experts, labels, colours, strict=True)):
            axes.plot(
                depths, means[name], marker=_MARKERS[index % len(_MARKERS)], markersize=5, color=colour, label=text
            )
    _whole_numbers(axes)
    axes.set_xlabel("layer")
    axes.set_ylabel(label)
    axes.set_title(title)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def _mean_pairs(report: Report, field: str) -> list[list[float]] | None:
    index = {name: i for i, name in enumerate(report.experts)}
    total = [[0.0] * len(index) for _ in index]
    count = [[0] * len(index) for _ in index]
    for layer in _solved(report):
        if layer.interference is None:
            continue
        pairs: tuple[tuple[float, ...], ...] = getattr(layer.interference, field)
        for row, first in zip(pairs, layer.experts, strict=True):
            for number, second in zip(row, layer.experts, strict=True):
                total[index[first.expert]][index[second.expert]] += number
                count[index[first.expert]][index[second.expert]] += 1
    if not any(number for row in count for number in row):
        return None
    return [[t / c if c else math.nan for t, c in zip(*rows, strict=True)] for rows in zip(total, count, strict=True)]


def _matrix(
    axes: Axes, values: Sequence[Sequence[float]], labels: Sequence[str], title: str, colours: str, low: float
) -> None:
    axes.imshow(values, cmap=colours, vmin=low, vmax=1.0)
    axes.grid(False)
    axes.set_xticks(range(len(labels)), labels, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_title(title)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if len(labels) <= _MOST_ENTRIES:
        for row, numbers in enumerate(values):
            for column, number in enumerate(numbers):
                if not math.isnan(number):
                    dark = abs(number) > 0.6
                    axes.text(column, row, f"{number:.2f}", ha="center", va="center", fontsize=8,
                              color="white" if dark else _INK)  # fmt: skip


def _axes(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height))
    return figure, figure.subplots()


def _log_heterogeneity(axes: Axes, axis: str, layers: Sequence[LayerReport]) -> None:
    finite = [value for layer in layers if (value := gate_statistic(layer)) and math.isfinite(value)]
    gate = next((layer.gate for layer in layers if layer.gate is not None), None)
    statistic = "published" if gate is None else gate.statistic.replace("_", "-")
    text = f"heterogeneity ({statistic})"
    if axis == "y":
        axes.set_ylabel(text)
    else:
        axes.set_xlabel(text)
    if finite:
        _logarithmic(axes, axis, subs=(1.0, 2.0, 5.0))


def _logarithmic(axes: Axes, axis: str, subs: Sequence[float] = (1.0,)) -> None:
    """A logarithmic axis whose labels are plain numbers: matplotlib's own are formulas, which we do not parse."""
    if axis == "x":
        axes.set_xscale("log")
    else:
        axes.set_yscale("log")
    ticks = axes.xaxis if axis == "x" else axes.yaxis
    ticks.set_major_locator(LogLocator(subs=subs))
    ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ticks.set_minor_formatter(NullFormatter())


def _draw_thresholds(line: Callable[..., object], layers: Sequence[LayerReport]) -> None:
    for threshold in sorted({layer.gate.threshold for layer in layers if layer.gate is not None}):
        if 0 < threshold < math.inf:
            line(threshold, color="#B3261E", linewidth=1.2, linestyle="--", label=f"threshold {threshold:g}")


def _solved(report: Report) -> list[LayerReport]:
    return [layer for layer in report.layers if layer.branch in SOLVED and len(layer.experts) > 1]


def _kinds(layers: Sequence[LayerReport]) -> list[str]:
    return list(dict.fromkeys(layer.kind for layer in layers))


def _whole_numbers(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _colour(index: int) -> str:
    return _COLOURS[index] if index < len(_COLOURS) else f"C{index % 10}"


def _clip(text: str, most: int = 28) -> str:
    """The end of a name is what tells it from others."""
    text = printable(text)
    return text if len(text) <= most else f"…{text[1 - most :]}"
