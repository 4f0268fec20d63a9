"""The report's documentation, made from its classes: a JSON Schema, and `docs/report-schema.md`.

`python -m mergekit_ace.report.schema > docs/report-schema.md` writes the page.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any, get_args, get_type_hints

from pydantic import BaseModel

from mergekit_ace.report.model import SCHEMA_VERSION, Report

_INTRODUCTION = f"""\
# The JSON of `mergekit-ace inspect --json`, version {SCHEMA_VERSION}

One object, a `Report`. A number that was not measured is `null`; an infinite one is the string `"Infinity"`. In Python,
`mergekit_ace.report.as_json.read_json` gives the same classes back, and `mergekit_ace.report.schema.json_schema` the
JSON Schema (draft 2020-12). This page is made from them by `python -m mergekit_ace.report.schema`.

`D` is an expert's task vector (fine-tuned minus base weight, `[m, n]`, outputs by inputs), `W` the merged one, `lambda`
included. `||.||_F` is the Frobenius norm.
"""


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a report."""
    return Report.model_json_schema(mode="serialization")


def schema_page() -> str:
    """The text of `docs/report-schema.md`: a table for each class, in the order in which a reader meets them."""
    schema = json_schema()
    properties = {name: record["properties"] for name, record in schema["$defs"].items()}
    properties[Report.__name__] = schema["properties"]
    return "\n".join([_INTRODUCTION, *(_section(record, properties[record.__name__]) for record in _records(Report))])


def _records(first: type) -> Iterable[type]:
    """The class and every class that a field of it holds, breadth first."""
    found = [first]
    for record in found:
        held = [part for annotation in get_type_hints(record).values() for part in _parts(annotation)]
        found += dict.fromkeys(part for part in held if part not in found)
    return found


def _parts(annotation: Any) -> Iterator[type]:
    if is_dataclass(annotation) or (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        yield annotation  # type: ignore[misc]
    for argument in get_args(annotation):
        yield from _parts(argument)


def _section(record: type, properties: Mapping[str, Any]) -> str:
    summary = (inspect.getdoc(record) or "").partition("\n\n")[0]
    lines = [f"## {record.__name__}", "", _line(summary), "", "| field | type | meaning |", "| --- | --- | --- |"]
    lines += [
        f"| `{name}` | {_type(field)} | {_line(field.get('description', ''))} |" for name, field in properties.items()
    ]
    return "\n".join([*lines, ""])


def _line(text: str) -> str:
    return re.sub(r"\bNone\b", "null", " ".join(text.split())).replace("|", "\\|")


def _type(field: Mapping[str, Any]) -> str:
    if "$ref" in field:
        return f"`{field['$ref'].rpartition('/')[2]}`"
    if "enum" in field:
        return " or ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if "anyOf" in field:
        return " or ".join(_type(choice) for choice in field["anyOf"])
    if field["type"] == "array":
        return f"list of {_type(field['items'])}"
    if field["type"] == "object":
        return f"object of {_type(field['additionalProperties'])}"
    return str(field["type"])


if __name__ == "__main__":
    print(schema_page(), end="")
