"""Overlap and alignment of the experts, pair by pair."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mergekit_ace.report.model import Report
from mergekit_ace.report.naming import short_names
from mergekit_ace.report.plots.look import INK, MOST_ENTRIES, WIDTH, clip
from mergekit_ace.report.summary import compared


def interference_matrices(report: Report) -> Figure | None:
    """Overlap of input subspaces and alignment of task vectors of every pair of experts, averaged over the tensors."""
    names = report.experts
    overlap = _mean_pairs(report, "overlap")
    alignment = _mean_pairs(report, "alignment")
    if overlap is None or alignment is None:
        return None
    short = short_names(names)
    labels = [clip(short[name], 16) for name in names]
    # One above the other: side by side the numbers are too small for a phone.
    figure = Figure(figsize=(WIDTH, 1.8 + 0.84 * len(names)))
    upper, lower = figure.subplots(2, 1, sharex=True)
    _matrix(upper, overlap, labels, "Overlap of input subspaces", "Blues", 0.0)
    _matrix(lower, alignment, labels, "Alignment of task vectors", "RdBu_r", -1.0)
    return figure


def _mean_pairs(report: Report, field: str) -> list[list[float]] | None:
    index = {name: i for i, name in enumerate(report.experts)}
    total = [[0.0] * len(index) for _ in index]
    count = [[0] * len(index) for _ in index]
    for tensor in compared(report):
        if tensor.interference is None:
            continue
        pairs: tuple[tuple[float, ...], ...] = getattr(tensor.interference, field)
        for row, first in zip(pairs, tensor.experts, strict=True):
            for number, second in zip(row, tensor.experts, strict=True):
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
    if len(labels) <= MOST_ENTRIES:
        for row, numbers in enumerate(values):
            for column, number in enumerate(numbers):
                if not math.isnan(number):
                    dark = abs(number) > 0.6
                    axes.text(column, row, f"{number:.2f}", ha="center", va="center", fontsize=8,
                              color="white" if dark else INK)  # fmt: skip
