"""A report as a table: one row a tensor, three columns an expert."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mergekit_ace.report.model import Report, TensorReport
from mergekit_ace.report.naming import short_names
from mergekit_ace.report.wording import label

_Cell = str | int | float | None
_PER_EXPERT = ("norm", "energy_share", "loss")
_WHERE_MEASURED = ("measured_loss", "estimate_correlation")
_NESTED = ("experts", "left_out", "interference", "parameters", "merge", "merged", "gate")
# A spreadsheet takes text that begins so for a formula, and names come from checkpoints.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def to_csv(report: Report) -> str:
    """The table, with a header; what was not measured is empty."""
    short = short_names(report.experts)
    entries = [expert for tensor in report.tensors for expert in tensor.experts]
    measured = [f for f in _WHERE_MEASURED if any(getattr(expert, f) is not None for expert in entries)]
    per_expert = [(name, field) for field in (*_PER_EXPERT, *measured) for name in report.experts]
    rows = [dict(_cells(tensor)) for tensor in report.tensors]
    # What a merge records of itself depends on the method: the columns are those that occur.
    columns = list(dict.fromkeys([*dict(_plain_cells(_EMPTY)), *(column for row in rows for column in row)]))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([_text(c) for c in [*columns, *(f"{field} {short[name]}" for name, field in per_expert)]])
    for tensor, row in zip(report.tensors, rows, strict=True):
        experts = {expert.expert: expert for expert in tensor.experts}
        cells = [
            *(row.get(column) for column in columns),
            *(getattr(experts.get(name), field, None) for name, field in per_expert),
        ]
        writer.writerow([_text(cell) if isinstance(cell, str) else cell for cell in cells])
    return file.getvalue()


def write_csv(report: Report, file: Path) -> None:
    """Write `to_csv` to a file."""
    file.write_text(to_csv(report), encoding="utf-8", newline="")


_EMPTY = TensorReport(name="", depth=None, kind="", shape=(), treatment="base", reason="")


def _cells(tensor: TensorReport) -> Iterator[tuple[str, _Cell]]:
    yield from _plain_cells(tensor)
    document = tensor.model_dump(include={"gate", "merge", "merged"})
    for part in ("gate", "merge", "merged"):
        yield from _numbers(part, document[part] or {})


def _plain_cells(tensor: TensorReport) -> Iterator[tuple[str, _Cell]]:
    for name in TensorReport.model_fields:
        if name == "shape":
            yield name, "x".join(map(str, tensor.shape))
        elif name == "treatment":
            yield name, label(tensor)
        elif name == "seconds":
            yield name, round(tensor.seconds, 4)
        elif name not in _NESTED:
            yield name, getattr(tensor, name)


def _numbers(prefix: str, document: Mapping[str, Any]) -> Iterator[tuple[str, _Cell]]:
    """The numbers and words of nested records, each under its path; spectra are left to the JSON."""
    for name, value in document.items():
        if isinstance(value, Mapping) and not name.startswith("spectrum"):
            yield from _numbers(f"{prefix}.{name}", value)
        elif isinstance(value, bool | int | float | str):
            yield f"{prefix}.{name}", value


def _text(cell: str) -> str:
    return f"'{cell}" if cell.startswith(_FORMULA) else cell
