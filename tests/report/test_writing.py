"""What is written from a report: JSON and its schema, CSV, the page, the pictures, the terminal."""

import csv
import io
import json
import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from mergekit_ace.printable import printable
from mergekit_ace.report.as_csv import to_csv
from mergekit_ace.report.as_html import breakable, to_html
from mergekit_ace.report.as_json import from_json, read_json, to_json, write_json
from mergekit_ace.report.as_png import write_png
from mergekit_ace.report.model import SCHEMA_VERSION, Report
from mergekit_ace.report.schema import json_schema, schema_page
from mergekit_ace.report.terminal import print_summary
from tests.report.made_up import HOSTILE, made_up_report

SCHEMA = Path(__file__).parents[2] / "docs" / "report-schema.md"
REPORT = made_up_report()


@cache
def page() -> str:
    return to_html(REPORT)


def test_json_comes_back_as_it_was(tmp_path: Path) -> None:
    write_json(REPORT, tmp_path / "report.json")
    assert read_json(tmp_path / "report.json") == REPORT
    assert json.loads(to_json(REPORT))["tensors"][3]["heterogeneity_published"] == "Infinity"


@pytest.mark.parametrize("text", ["{}", "[]", '{"schema_version": 1}', f'{{"schema_version": {SCHEMA_VERSION}}}'])
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"schema_version must be 2|must be a report"):
        from_json(text)


def test_the_documentation_is_the_schema() -> None:
    assert SCHEMA.read_text() == schema_page(), "python -m mergekit_ace.report.schema > docs/report-schema.md"
    rows = [line for line in schema_page().splitlines() if line.startswith("| `")]
    assert all(row.split(" | ")[2].strip("| ") for row in rows), "every field has a meaning"


def test_a_report_keeps_to_its_schema() -> None:
    schema = json_schema()
    assert schema["additionalProperties"] is False
    assert set(json.loads(to_json(REPORT))) == set(schema["properties"])
    assert {"MergeFacts", "Decision", "Gate"} < set(schema["$defs"])


def test_csv_has_a_row_a_tensor_and_no_formula() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(REPORT))))
    assert [row["treatment"] for row in rows] == ["homogeneous", *["heterogeneous"] * 3, "unchanged", "failed"]
    assert rows[0]["loss plain"] == "0.2"
    assert rows[0]["heterogeneity_published"] == "0.1"
    assert rows[0]["merge.ridge"] == "0.05"
    assert rows[1]["merge.decision.refined_directions"] == "2"
    assert rows[4]["merge.ridge"] == rows[4]["heterogeneity"] == ""
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
    found = _Page(page())
    assert found.scripts == 1
    assert all(link.startswith(("#", "data:")) for link in found.links)
    assert f"{printable(HOSTILE)}.weight" in found.text
    assert f"NaN in {printable(HOSTILE)}" in found.text
    assert "default-src 'none'" in page()


def test_the_page_shares_no_id_between_its_pictures() -> None:
    identifiers = re.findall(r'\bid="([^"]+)"', page())
    assert len(identifiers) == len(set(identifiers))


def fast(report: Report) -> Report:
    """As a fast pass that was interrupted leaves it."""
    bare = [
        tensor.model_copy(
            update={
                "merge": None,
                "merged": None,
                "interference": None,
                "experts": tuple(e.model_copy(update={"loss": None, "spectrum": None}) for e in tensor.experts),
            }
        )
        for tensor in report.tensors[:2]
    ]
    return report.model_copy(update={"mode": "fast", "complete": False, "tensors": tuple(bare)})


def test_a_page_of_an_interrupted_fast_pass_says_so() -> None:
    text = _Page(to_html(fast(REPORT))).text
    assert "Interrupted" in text
    assert "Heterogeneity by depth" in text
    assert "Spectrum of" not in text


def test_a_page_of_a_selection_says_so() -> None:
    some = REPORT.model_copy(update={"selection": "Measured 6 of 60 tensors: 2 of each layer type.", "planned": 60})
    text = _Page(to_html(some)).text
    assert "Measured 6 of 60 tensors" in text
    assert "6 measured, of 60" in text


def test_an_empty_report_is_a_page_too() -> None:
    assert "0 of 0" in to_html(REPORT.model_copy(update={"tensors": (), "complete": False}))


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("model.layers.3.up_proj.weight", ["model.", "layers.", "3.", "up_proj.", "weight"]),
        ("/models/v1.5/out", ["/models/", "v1.5/", "out"]),
        ("changed by 0.25 of it", ["changed by 0.25 of it"]),
        ("a&b.<i>", ["a&amp;b.&lt;i&gt;"]),
    ],
)
def test_names_break_after_a_dot_or_a_slash_only(text: str, lines: list[str]) -> None:
    assert str(breakable(text)).split("<wbr>") == lines


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
            assert picture.width == 920
            assert len(picture.convert("RGB").getcolors(maxcolors=1 << 24) or []) > 20


def shown(report: Report, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    print_summary(report, console)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_the_terminal_is_not_steered_by_names() -> None:
    text = shown(REPORT, 200)
    assert "\x1b" not in text
    assert "[red]" in text
    assert "plain" in text
    assert "error: lm_head.weight cannot be merged" in text


@pytest.mark.parametrize("width", [30, 50, 80, 120])
def test_names_are_whole_in_a_terminal_of_any_width(width: int) -> None:
    name = "model.layers.7.mlp.experts.3.gate_up_projection.weight"
    tensors = tuple(
        tensor.model_copy(update={"name": name if i == 0 else tensor.name}) for i, tensor in enumerate(REPORT.tensors)
    )
    losing = tensors[0].experts[0].model_copy(update={"loss": 0.9})
    first = tensors[0].model_copy(update={"experts": (losing, *tensors[0].experts[1:])})
    lines = shown(REPORT.model_copy(update={"tensors": (first, *tensors[1:])}), width).splitlines()
    title = next(i for i, line in enumerate(lines) if line.startswith("tensors of highest loss"))
    cells = [line.split()[0] for line in lines[title + 1 : title + 8] if line and not line.startswith(" ")]
    found = "".join(cells[: next(i for i, cell in enumerate(cells) if cell.endswith("projection")) + 1])
    assert found == "7.mlp.experts.3.gate_up_projection"


def test_equal_losses_are_called_neither_highest_nor_lowest() -> None:
    assert "highest" in shown(REPORT, 120).partition("tensors of")[0]
    alike = tuple(
        t.model_copy(
            update={"experts": tuple(e.model_copy(update={"loss": 0.4001 + i / 1e5}) for i, e in enumerate(t.experts))}
        )
        for t in REPORT.tensors
    )
    text = shown(REPORT.model_copy(update={"tensors": alike}), 120)
    assert "0.4" in text
    assert "highest" not in text
    assert "lowest" not in text
