"""A report as JSON, there and back."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from mergekit_ace.report.model import SCHEMA_VERSION, Report


def to_json(report: Report) -> str:
    """The report as JSON; an infinite number is the string `Infinity`, what was not measured is null."""
    return report.model_dump_json(indent=1)


def from_json(text: str) -> Report:
    """The report that `to_json` wrote.

    Raises:
        ValueError: when it is of another schema version, or not a report.
    """
    document = json.loads(text)
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != SCHEMA_VERSION:
        raise ValueError(f"schema_version must be {SCHEMA_VERSION}; got {version!r}")
    try:
        return Report.model_validate_json(text)
    except ValidationError as error:
        raise ValueError(f"the JSON must be a report of mergekit-ace; {error}") from error


def write_json(report: Report, file: Path) -> None:
    """Write `to_json` to a file."""
    file.write_text(to_json(report) + "\n", encoding="utf-8")


def read_json(file: Path) -> Report:
    """Read what `write_json` wrote; raises as `from_json`."""
    return from_json(file.read_text(encoding="utf-8"))
