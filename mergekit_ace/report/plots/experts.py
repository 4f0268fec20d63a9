"""Each expert's share of the updates, and its loss, over the depth of a model."""

from __future__ import annotations

import math
from collections.abc import Callable

from matplotlib.figure import Figure

from mergekit_ace.report.model import ExpertReport, Report
from mergekit_ace.report.naming import short_names
from mergekit_ace.report.plots.look import INK, LEGEND_COLUMNS, MARKERS, clip, colour_of, new_axes, whole_numbers
from mergekit_ace.report.summary import compared


def shares_by_depth(report: Report) -> Figure | None:
    """Each expert's mean share of the updates' energy, stacked, by depth."""
    title = "Share of the updates' energy by depth"
    return _by_depth(report, title, "share of energy", lambda e: e.energy_share, stacked=True)


def losses_by_depth(report: Report) -> Figure | None:
    """Each expert's mean loss by depth: 0 where its outputs are kept, 1 where the merge is as far as the base."""
    figure = _by_depth(report, "Loss of each expert by depth", "loss", lambda e: e.loss, stacked=False)
    if figure is not None:
        axes = figure.axes[0]
        axes.axhline(1.0, color=INK, linewidth=1, linestyle=":")
        axes.annotate("the base model", (1, 1), (0, 3), xycoords=("axes fraction", "data"), ha="right", fontsize=8,
                      textcoords="offset points")  # fmt: skip
        axes.set_ylim(bottom=0)
    return figure


def _by_depth(
    report: Report, title: str, label: str, value: Callable[[ExpertReport], float | None], *, stacked: bool
) -> Figure | None:
    depths = sorted({tensor.depth for tensor in compared(report) if tensor.depth is not None})
    means: dict[str, list[float]] = {name: [] for name in report.experts}
    for depth in depths:
        tensors = [tensor for tensor in compared(report) if tensor.depth == depth]
        for name in report.experts:
            values = [value(e) for tensor in tensors for e in tensor.experts if e.expert == name]
            known = [number for number in values if number is not None]
            # A stack must add up to 1: an expert that is left out of a tensor has no share in it.
            count = len(tensors) if stacked else len(known)
            means[name].append(sum(known) / count if known else (0.0 if stacked else math.nan))
    if not depths or all(math.isnan(number) for series in means.values() for number in series):
        return None
    short = short_names(report.experts)
    labels = [clip(short[name]) for name in report.experts]
    colours = [colour_of(index) for index in range(len(labels))]
    figure, axes = new_axes(3.3)
    if stacked:
        base = [0.0] * len(depths)
        for name, text, colour in zip(report.experts, labels, colours, strict=True):
            axes.bar(depths, means[name], 0.85, bottom=base, color=colour, label=text)
            base = [low + high for low, high in zip(base, means[name], strict=True)]
        axes.set_ylim(0, 1)
    else:
        for index, (name, text, colour) in enumerate(zip(report.experts, labels, colours, strict=True)):
            axes.plot(depths, means[name], marker=MARKERS[index % len(MARKERS)], markersize=5, color=colour, label=text)
    whole_numbers(axes)
    axes.set_xlabel("layer")
    axes.set_ylabel(label)
    axes.set_title(title)
    figure.legend(loc="outside lower center", ncols=LEGEND_COLUMNS)
    return figure
