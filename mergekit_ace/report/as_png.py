"""A report's pictures as PNG files, for papers."""

from __future__ import annotations

from pathlib import Path

from mergekit_ace.report.model import Report
from mergekit_ace.report.plots import figures, style


def write_png(report: Report, folder: Path) -> list[Path]:
    """Write every picture that the report has numbers for into `folder`, made if need be; returns the files.

    Args:
        report: complete or not.
        folder: an existing file of the same name is replaced.
    """
    folder.mkdir(exist_ok=True)
    files = []
    for name, figure in figures(report).items():
        file = folder / f"{name}.png"
        with style():
            figure.savefig(file)
        files.append(file)
    return files
