"""What is written from a report: JSON and its schema, CSV, the page, the pictures, the terminal."""

import csv
import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from mergekit_ace.printable import printable
from mergekit_ace.report import model
from mergekit_ace.report.as_csv import to_csv
from mergekit_ace.report.as_html import to_html
from mergekit_ace.report.as_json import from_json, json_schema, read_json, to_json, write_json
from mergekit_ace.report.as_png import write_png
from mergekit_ace.report.terminal import print_summary
from tests.report.made_up import EXPERTS, HOSTILE, made_up_report

SCHEMA = Path(__file__).parents[2] / "docs" / "report-schema.md"
REPORT = made_up_report()


def test_json_comes_back_as_it_was(tmp_path: Path) -> None:
    write_json(REPORT, tmp_path / "report.json")
    assert read_json(tmp_path / "report.json") == REPORT
    assert json.loads(to_json(REPORT))["layers"][3]["heterogeneity"] == "Infinity"


@pytest.mark.parametrize("text", ["{}", "[]", '{"schema_version": 99}', '{"schema_version": 1}'])
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"schema_version must be 1|must be a report"):
        from_json(text)


def test_the_schema_is_documented_field_by_field() -> None:
    text = SCHEMA.read_text()
    assert f"version {model.SCHEMA_VERSION}" in text
    defined = json_schema()["$defs"]
    for kind in (model.Report, *(getattr(model, name) for name in defined)):
        section = text.partition(f"## {kind.__name__}\n")[2].partition("\n## ")[0]
        documented = re.findall(r"^\| `(\w+)`", section, re.MULTILINE)
        assert documented == [field.name for field in dataclasses.fields(kind)], kind.__name__


def test_csv_has_a_row_a_layer_and_no_formula() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(REPORT))))
    assert [row["branch"] for row in rows] == [layer.branch for layer in REPORT.layers]
    assert rows[0]["loss plain"] == "0.2"
    assert rows[0]["heterogeneity"] == "0.1"
    assert rows[4]["heterogeneity"] == ""
    assert rows[3]["name"] == f"'{HOSTILE}.weight"
    assert not any(cell and cell[0] in "=+@" for row in rows for cell in row.values())


class _Page(HTMLParser):
    """Tags, the text between them, and what could reach out of the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts = 0
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        assert not any(name.startswith("on") for name, _ in attributes)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "action", "data"):
                self.links.append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_escapes_names_and_reaches_for_nothing() -> None:
    page = _Page(to_html(REPORT))
    assert page.scripts == 1
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert f"{printable(HOSTILE)}.weight" in page.text
    assert f"NaN in {printable(HOSTILE)}" in page.text
    assert "default-src 'none'" in to_html(REPORT)


def test_the_page_shares_no_id_between_its_pictures() -> None:
    identifiers = re.findall(r'\bid="([^"]+)"', to_html(REPORT))
    assert len(identifiers) == len(set(identifiers))


def test_a_page_of_an_interrupted_fast_pass_says_so() -> None:
    bare = [
        dataclasses.replace(
            layer,
            merged=None,
            interference=None,
            condition=None,
            experts=tuple(dataclasses.replace(e, loss=None, spectrum=None) for e in layer.experts),
        )
        for layer in REPORT.layers[:2]
    ]
    fast = dataclasses.replace(REPORT, mode="fast", complete=False, layers=tuple(bare))
    text = _Page(to_html(fast)).text
    assert "Interrupted" in text
    assert "Heterogeneity by depth" in text
    assert "Spectrum of" not in text


def test_an_empty_report_is_a_page_too() -> None:
    assert "0 of 0" in to_html(dataclasses.replace(REPORT, layers=(), complete=False))


def test_pictures_are_written_and_not_blank(tmp_path: Path) -> None:
    files = write_png(REPORT, tmp_path / "pictures")
    assert {file.stem for file in files} == {
        "heterogeneity-by-depth",
        "heterogeneity-by-type",
        "shares-by-depth",
        "losses-by-depth",
        "interference",
        "spectra",
    }
    for file in files:
        with Image.open(file) as picture:
            assert picture.width == 1280
            assert len(picture.convert("RGB").getcolors(maxcolors=1 << 24) or []) > 20


def test_the_terminal_is_not_steered_by_names() -> None:
    console = Console(file=io.StringIO(), width=200, force_terminal=False)
    print_summary(REPORT, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b" not in shown
    assert "[red]" in shown
    assert f"{EXPERTS[0].rsplit('/', 1)[-1]}" in shown
    assert "error: lm_head.weight cannot be merged" in shown
