"""Singular values of single layers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mergekit_ace.report.model import LayerReport, Report, Spectrum
from mergekit_ace.report.naming import short_names
from mergekit_ace.report.plots.look import INK, WIDTH, clip, colour_of, logarithmic
from mergekit_ace.report.summary import badness


def spectra(layers: Sequence[LayerReport], experts: Sequence[str]) -> Figure | None:
    """Singular values of the experts' updates and of the merged one, before and after refinement; one panel a layer."""
    layers = [layer for layer in layers if layer.merged is not None]
    if not layers:
        return None
    columns = min(2, len(layers))
    rows = math.ceil(len(layers) / columns)
    short = short_names(experts)
    figure = Figure(figsize=(WIDTH, 0.6 + 2.5 * rows))
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel in panels.flat[len(layers) :]:
        panel.remove()
    for axes, layer in zip(panels.flat, layers, strict=False):
        _spectrum(axes, layer, {name: (clip(short[name]), colour_of(i)) for i, name in enumerate(experts)})
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


def _spectrum(axes: Axes, layer: LayerReport, experts: Mapping[str, tuple[str, str]]) -> None:
    for expert in layer.experts:
        if expert.spectrum is not None:
            label, colour = experts[expert.expert]
            axes.plot(expert.spectrum.ranks, expert.spectrum.values, color=colour, linewidth=1, alpha=0.7, label=label)
    if layer.merged is not None:
        before, after = layer.merged.spectrum_before, layer.merged.spectrum
        if before is not None:
            axes.plot(before.ranks, before.values, color=INK, linewidth=1.6, linestyle="--", label="before refinement")
        axes.plot(after.ranks, after.values, color=INK, linewidth=2, label="merged")
    logarithmic(axes, "x")
    logarithmic(axes, "y")
    tops = [spectrum.values[0] for spectrum in _spectra_of(layer) if spectrum.values and spectrum.values[0] > 0]
    if tops:
        axes.set_ylim(bottom=max(tops) * 1e-3)
    axes.set_title(clip(layer.name, 44), fontsize=9)
    axes.set_xlabel("rank")
    axes.set_ylabel("singular value")


def _spectra_of(layer: LayerReport) -> Iterator[Spectrum]:
    yield from (expert.spectrum for expert in layer.experts if expert.spectrum is not None)
    if layer.merged is not None:
        yield layer.merged.spectrum
