"""The heterogeneity of the updates over a model: the gate's statistic, or the scale-free one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mergekit_ace.report.model import Report, TensorReport
from mergekit_ace.report.plots.look import (
    INK,
    LEGEND_COLUMNS,
    MARKERS,
    MOST_ENTRIES,
    clip,
    colour_of,
    logarithmic,
    new_axes,
    whole_numbers,
)
from mergekit_ace.report.summary import compared, gate_statistic

_DECADE = 10.0


def heterogeneity_by_depth(report: Report) -> Figure | None:
    """The heterogeneity of every merged tensor by its depth, one mark a layer type, with the gate's threshold."""
    tensors = [tensor for tensor in _measured(report) if tensor.depth is not None]
    if not tensors:
        return None
    figure, axes = new_axes(3.8)
    kinds = _kinds(tensors)
    for index, kind in enumerate(kinds):
        some = [tensor for tensor in tensors if tensor.kind == kind]
        axes.plot(
            [tensor.depth or 0 for tensor in some],
            [gate_statistic(tensor) or 0.0 for tensor in some],
            MARKERS[index % len(MARKERS)],
            color=colour_of(index),
            markersize=5,
            alpha=0.85,
            label=clip(kind) if index < MOST_ENTRIES else None,
        )
    _scale(axes, "y", tensors)
    _draw_thresholds(axes.axhline, tensors)
    whole_numbers(axes)
    axes.set_xlabel("layer")
    axes.set_title("Heterogeneity by depth")
    figure.legend(loc="outside lower center", ncols=LEGEND_COLUMNS)
    return figure


def heterogeneity_by_kind(report: Report) -> Figure | None:
    """The heterogeneity of every merged tensor by its layer type, with the median of each and the gate's threshold."""
    tensors = _measured(report)
    if not tensors:
        return None
    kinds = _kinds(tensors)
    figure, axes = new_axes(1.2 + 0.32 * len(kinds))
    for index, kind in enumerate(kinds):
        values = sorted(gate_statistic(tensor) or 0.0 for tensor in tensors if tensor.kind == kind)
        axes.plot(values, [index] * len(values), "o", color=colour_of(index), markersize=5, alpha=0.6)
        axes.plot([values[len(values) // 2]], [index], "|", color=INK, markersize=15, markeredgewidth=1.8)
    axes.set_yticks(range(len(kinds)), [clip(kind) for kind in kinds])
    axes.invert_yaxis()
    _scale(axes, "x", tensors)
    _draw_thresholds(axes.axvline, tensors)
    axes.set_title("By layer type (bar: median)")
    return figure


def _measured(report: Report) -> list[TensorReport]:
    return [tensor for tensor in compared(report) if gate_statistic(tensor) is not None]


def _scale(axes: Axes, axis: str, tensors: Sequence[TensorReport]) -> None:
    finite = [value for tensor in tensors if (value := gate_statistic(tensor)) and math.isfinite(value)]
    gate = next((tensor.gate for tensor in tensors if tensor.gate is not None), None)
    statistic = "scale-free" if gate is None else gate.statistic.replace("_", "-")
    text = f"heterogeneity ({statistic})"
    if axis == "y":
        axes.set_ylabel(text)
    else:
        axes.set_xlabel(text)
    if finite and max(finite) > _DECADE * min(finite):
        logarithmic(axes, axis, subs=(1.0, 2.0, 5.0))


def _draw_thresholds(line: Callable[..., object], tensors: Sequence[TensorReport]) -> None:
    for threshold in sorted({tensor.gate.threshold for tensor in tensors if tensor.gate is not None}):
        if 0 < threshold < math.inf:
            line(threshold, color="#B3261E", linewidth=1.2, linestyle="--", label=f"threshold {threshold:g}")


def _kinds(tensors: Sequence[TensorReport]) -> list[str]:
    return list(dict.fromkeys(tensor.kind for tensor in tensors))
