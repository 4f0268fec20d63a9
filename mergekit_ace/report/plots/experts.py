"""What every expert brings to the layers of a model, and what it loses in them."""

from __future__ import annotations

import math
from collections.abc import Callable

from matplotlib.figure import Figure

from mergekit_ace.report.model import ExpertReport, Report
from mergekit_ace.report.naming import short_names
from mergekit_ace.report.plots.look import INK, MARKERS, clip, colour_of, new_axes, whole_numbers
from mergekit_ace.report.summary import compared_layers


def shares_by_depth(report: Report) -> Figure | None:
    """Each expert's mean share of the trace, stacked, by depth."""
    return _by_depth(report, "Expert shares by depth", "share of the trace", lambda e: e.trace_share, stacked=True)


def losses_by_depth(report: Report) -> Figure | None:
    """Each expert's mean loss by depth: 0 is nothing lost, 1 is as far as the base."""
    figure = _by_depth(report, "What the merge costs each expert, by depth", "loss", lambda e: e.loss, stacked=False)
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
    depths = sorted({layer.depth for layer in compared_layers(report) if layer.depth is not None})
    means: dict[str, list[float]] = {name: [] for name in report.experts}
    for depth in depths:
        layers = [layer for layer in compared_layers(report) if layer.depth == depth]
        for name in report.experts:
            values = [value(e) for layer in layers for e in layer.experts if e.expert == name]
            known = [number for number in values if number is not None]
            # A stack must add up to 1: an expert that is left out of a layer has no share in it.
            count = len(layers) if stacked else len(known)
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
    figure.legend(loc="outside lower center", ncols=3)
    return figure
