"""The gate's statistic over the layers of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mergekit_ace.report.model import LayerReport, Report
from mergekit_ace.report.plots.look import (
    INK,
    MARKERS,
    MOST_ENTRIES,
    clip,
    colour_of,
    logarithmic,
    new_axes,
    whole_numbers,
)
from mergekit_ace.report.summary import compared_layers, gate_statistic


def heterogeneity_by_depth(report: Report) -> Figure | None:
    """The gate's statistic of every gated layer by its depth, one mark a layer type, with the threshold."""
    layers = [layer for layer in _gated_layers(report) if layer.depth is not None]
    if not layers:
        return None
    figure, axes = new_axes(3.8)
    kinds = _kinds(layers)
    for index, kind in enumerate(kinds):
        some = [layer for layer in layers if layer.kind == kind]
        axes.plot(
            [layer.depth or 0 for layer in some],
            [gate_statistic(layer) or 0.0 for layer in some],
            MARKERS[index % len(MARKERS)],
            color=colour_of(index),
            markersize=5,
            alpha=0.85,
            label=clip(kind) if index < MOST_ENTRIES else None,
        )
    _log_heterogeneity(axes, "y", layers)
    _draw_thresholds(axes.axhline, layers)
    whole_numbers(axes)
    axes.set_xlabel("layer")
    axes.set_title("Heterogeneity by depth")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def heterogeneity_by_kind(report: Report) -> Figure | None:
    """The gate's statistic of every gated layer by its layer type, with the median of each and the threshold."""
    layers = _gated_layers(report)
    if not layers:
        return None
    kinds = _kinds(layers)
    figure, axes = new_axes(1.2 + 0.32 * len(kinds))
    for index, kind in enumerate(kinds):
        values = sorted(gate_statistic(layer) or 0.0 for layer in layers if layer.kind == kind)
        axes.plot(values, [index] * len(values), "o", color=colour_of(index), markersize=5, alpha=0.6)
        axes.plot([values[len(values) // 2]], [index], "|", color=INK, markersize=15, markeredgewidth=1.8)
    axes.set_yticks(range(len(kinds)), [clip(kind) for kind in kinds])
    axes.invert_yaxis()
    _log_heterogeneity(axes, "x", layers)
    _draw_thresholds(axes.axvline, layers)
    axes.set_title("Heterogeneity by layer type (bar: median)")
    return figure


def _gated_layers(report: Report) -> list[LayerReport]:
    return [layer for layer in compared_layers(report) if gate_statistic(layer) is not None]


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
        logarithmic(axes, axis, subs=(1.0, 2.0, 5.0))


def _draw_thresholds(line: Callable[..., object], layers: Sequence[LayerReport]) -> None:
    for threshold in sorted({layer.gate.threshold for layer in layers if layer.gate is not None}):
        if 0 < threshold < math.inf:
            line(threshold, color="#B3261E", linewidth=1.2, linestyle="--", label=f"threshold {threshold:g}")


def _kinds(layers: Sequence[LayerReport]) -> list[str]:
    return list(dict.fromkeys(layer.kind for layer in layers))
