"""The pictures of a report, as matplotlib figures. Nothing is measured here, and nothing written."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from matplotlib.figure import Figure

from mergekit_ace.report.model import Report
from mergekit_ace.report.plots.experts import losses_by_depth, shares_by_depth
from mergekit_ace.report.plots.heterogeneity import heterogeneity_by_depth, heterogeneity_by_kind
from mergekit_ace.report.plots.interference import interference_matrices
from mergekit_ace.report.plots.look import style
from mergekit_ace.report.plots.spectra import spectra

__all__ = ["FIGURES", "figures", "spectra", "style"]

FIGURES: Mapping[str, Callable[[Report], Figure | None]] = {
    "heterogeneity-by-depth": heterogeneity_by_depth,
    "heterogeneity-by-type": heterogeneity_by_kind,
    "shares-by-depth": shares_by_depth,
    "losses-by-depth": losses_by_depth,
    "interference": interference_matrices,
    "spectra": lambda report: spectra(report.tensors, report.experts),
}
"""Name of the file -> what draws it."""


def figures(report: Report) -> dict[str, Figure]:
    """Every figure that the report has numbers for, by the name of its file."""
    drawn: dict[str, Figure] = {}
    with style():
        for name, draw in FIGURES.items():
            figure = draw(report)
            if figure is not None:
                drawn[name] = figure
    return drawn
