"""A report as a table: one row a layer, three columns an expert."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from mergekit_ace.report.model import LayerReport, Report
from mergekit_ace.report.naming import short_names

_Cell = str | int | float | None
_PER_EXPERT = ("norm", "trace_share", "loss")
# A spreadsheet takes text that begins so for a formula, and names come from checkpoints.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def to_csv(report: Report) -> str:
    """The table, with a header; what was not measured is empty."""
    short = short_names(report.experts)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    per_expert = [(name, field) for field in _PER_EXPERT for name in report.experts]
    columns = list(_layer_cells(_EMPTY)) + [f"{field} {short[name]}" for name, field in per_expert]
    writer.writerow([_text(column) for column in columns])
    for layer in report.layers:
        experts = {expert.expert: expert for expert in layer.experts}
        cells = [
            *_layer_cells(layer).values(),
            *(getattr(experts.get(name), field, None) for name, field in per_expert),
        ]
        writer.writerow([_text(cell) if isinstance(cell, str) else cell for cell in cells])
    return file.getvalue()


def write_csv(report: Report, file: Path) -> None:
    """Write `to_csv` to a file."""
    file.write_text(to_csv(report), encoding="utf-8", newline="")


_EMPTY = LayerReport(name="", depth=None, kind="", shape=(), branch="base", reason="")


def _layer_cells(layer: LayerReport) -> dict[str, _Cell]:
    merged = layer.merged
    return {
        "name": layer.name,
        "depth": layer.depth,
        "kind": layer.kind,
        "shape": "x".join(map(str, layer.shape)),
        "branch": layer.branch,
        "reason": layer.reason,
        "experts": len(layer.experts),
        "left_out": len(layer.left_out),
        "heterogeneity": layer.heterogeneity,
        "heterogeneity_scale_free": layer.heterogeneity_scale_free,
        "threshold": layer.gate.threshold if layer.gate else None,
        "ridge": layer.ridge,
        "condition": layer.condition,
        "refined_directions": layer.refined_directions,
        "effective_experts": layer.effective_experts,
        "shortening": layer.shortening,
        "retention": layer.retention,
        "low_rank": layer.low_rank,
        "correlation": layer.correlation,
        "merged_norm": merged.norm if merged else None,
        "merged_relative_norm": merged.relative_norm if merged else None,
        "merged_relative_change": merged.relative_change if merged else None,
        "top_energy_before": merged.top_energy_before if merged else None,
        "top_energy": merged.top_energy if merged else None,
        "seconds": round(layer.seconds, 4),
        "error": layer.error,
    }


def _text(cell: str) -> str:
    return f"'{cell}" if cell.startswith(_FORMULA) else cell
