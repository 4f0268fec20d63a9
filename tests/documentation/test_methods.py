"""The pages of the methods name the parameters that the methods have, with their defaults, and no others."""

import re
from pathlib import Path

import pytest

from mergekit_ace.methods import METHODS
from mergekit_ace.methods.layerwise import LayerwiseMethod
from tests.documentation.pages import ROOT

_ROW = re.compile(r"^\| `(\w+)` \| ([^|]*) \| `?([^|`]*)`? \|", re.M)


def rows(page: Path) -> dict[str, str]:
    """Parameter -> default, of a page's table."""
    section = page.read_text().split("## Parameters")[1].split("\n## ")[0]
    return {name: default.strip() for name, _, default in _ROW.findall(section)}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_parameters(method: LayerwiseMethod) -> None:
    page = rows(ROOT / "docs" / "methods" / f"{method.name}.md")
    assert page.keys() == {parameter.name for parameter in method.own_parameters}
    for parameter in method.own_parameters:
        if parameter.default not in ("preset", ""):  # a preset's values are held by tests/matrix
            documented = page[parameter.name]
            assert documented == str(parameter.default) or float(documented) == parameter.default, parameter.name


def test_every_method_has_a_page_and_a_citation() -> None:
    citations = (ROOT / "docs" / "citations.md").read_text()
    pages = {page.stem for page in (ROOT / "docs" / "methods").glob("*.md")} - {"index"}
    assert pages == {method.name for method in METHODS}
    for method in METHODS:
        number = method.reference_url.rpartition("/")[2]
        assert f"`{method.name}`" in citations
        assert number in citations
        assert number in (ROOT / "docs" / "methods" / f"{method.name}.md").read_text()
