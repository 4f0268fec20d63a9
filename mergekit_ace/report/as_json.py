"""A report as JSON, there and back, and the schema of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mergekit_ace.report.model import SCHEMA_VERSION, Report

_ADAPTER = TypeAdapter(Report)


def to_json(report: Report) -> str:
    """The report as JSON; an infinite number is the string `Infinity`, what was not measured is null."""
    return _ADAPTER.dump_json(report, indent=1).decode()


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
        return _ADAPTER.validate_json(text)
    except ValidationError as error:
        raise ValueError(f"the JSON must be a report of mergekit-ace; {error}") from error


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a report."""
    return _ADAPTER.json_schema(mode="serialization")


def write_json(report: Report, file: Path) -> None:
    """Write `to_json` to a file."""
    file.write_text(to_json(report) + "\n", encoding="utf-8")


def read_json(file: Path) -> Report:
    """Read what `write_json` wrote; raises as `from_json`."""
    return from_json(file.read_text(encoding="utf-8"))
