"""A report's pictures as PNG files, for papers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mergekit_ace.report.model import LayerReport, Report
from mergekit_ace.report.plots import figures, spectra, style


def write_png(report: Report, folder: Path, spectra_of: Sequence[LayerReport] | None = None) -> list[Path]:
    """Write every picture that the report has numbers for into `folder`, made if need be; returns the files.

    Args:
        report: complete or not.
        folder: an existing file of the same name is replaced.
        spectra_of: layers whose spectra are drawn; the refined and the worst ones when None.
    """
    folder.mkdir(exist_ok=True)
    drawn = figures(report)
    if spectra_of is not None:
        with style():
            chosen = spectra(spectra_of, report.experts)
        drawn.pop("spectra", None)
        if chosen is not None:
            drawn["spectra"] = chosen
    files = []
    for name, figure in drawn.items():
        file = folder / f"{name}.png"
        with style():
            figure.savefig(file)
        files.append(file)
    return files
