"""Singular values of single matrices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mergekit_ace.report.model import Spectrum, TensorReport
from mergekit_ace.report.naming import from_layer, short_names
from mergekit_ace.report.plots.look import INK, LEGEND_COLUMNS, WIDTH, clip, colour_of, logarithmic

_MOST_PANELS = 8
_TITLE_WIDTH = 48


def spectra(tensors: Sequence[TensorReport], experts: Sequence[str]) -> Figure | None:
    """Singular values of the experts' updates and of the merged one, with and without refinement; a panel a tensor."""
    measured = [tensor for tensor in tensors if tensor.merged is not None and tensor.merged.spectrum is not None]
    measured = measured[:_MOST_PANELS]
    if not measured:
        return None
    columns = min(2, len(measured))
    rows = math.ceil(len(measured) / columns)
    short = short_names(experts)
    labels = {name: (clip(short[name]), colour_of(i)) for i, name in enumerate(experts)}
    figure = Figure(figsize=(WIDTH, 0.6 + 2.5 * rows))
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel in panels.flat[len(measured) :]:
        panel.remove()
    for axes, tensor in zip(panels.flat, measured, strict=False):
        _spectrum(axes, tensor, labels, _TITLE_WIDTH // columns)
    known = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=LEGEND_COLUMNS)
    return figure


def _spectrum(axes: Axes, tensor: TensorReport, experts: Mapping[str, tuple[str, str]], most: int) -> None:
    for expert in tensor.experts:
        if expert.spectrum is not None:
            label, colour = experts[expert.expert]
            axes.plot(expert.spectrum.ranks, expert.spectrum.values, color=colour, linewidth=1, alpha=0.7, label=label)
    if tensor.merged is not None and tensor.merged.spectrum is not None:
        before, after = tensor.merged.spectrum_before, tensor.merged.spectrum
        if before is not None:
            axes.plot(before.ranks, before.values, color=INK, linewidth=1.6, linestyle="--", label="before refinement")
        axes.plot(after.ranks, after.values, color=INK, linewidth=2, label="merged")
    logarithmic(axes, "x")
    logarithmic(axes, "y")
    tops = [spectrum.values[0] for spectrum in _spectra_of(tensor) if spectrum.values and spectrum.values[0] > 0]
    if tops:
        axes.set_ylim(bottom=max(tops) * 1e-3)
    axes.set_title(clip(from_layer(tensor.name), most), fontsize=9)
    axes.set_xlabel("rank")
    axes.set_ylabel("singular value")


def _spectra_of(tensor: TensorReport) -> Iterator[Spectrum]:
    yield from (expert.spectrum for expert in tensor.experts if expert.spectrum is not None)
    if tensor.merged is not None and tensor.merged.spectrum is not None:
        yield tensor.merged.spectrum
