"""The page, looked at in a real browser. `make test-browser` runs this; it needs Chromium and fails without."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from mergekit_ace.printable import printable
from mergekit_ace.report.as_html import write_html
from tests.report.browser import Page, browser
from tests.report.made_up import HOSTILE, made_up_report

pytestmark = pytest.mark.browser

PHONE = {"width": 375, "height": 700, "mobile": True}
NAMES = "[...document.querySelectorAll('#tensors tbody tr:not([hidden]) th')].map(cell => cell.textContent)"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "report.html"
    write_html(made_up_report(), file)
    return file


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def opened(page: Page, file: Path) -> Iterator[Page]:
    """The page; and after the test, that it has complained of nothing and asked nobody for anything."""
    page.open(file)
    yield page
    assert page.complaints() == []
    assert [url for url in page.requests() if not url.startswith("data:")] == [file.as_uri()]


def press(page: Page, heading: str) -> None:
    page.evaluate(f"[...document.querySelectorAll('#tensors button')].find(b => b.textContent === '{heading}').click()")


def column(page: Page, number: int) -> list[str]:
    texts: list[str] = page.evaluate(
        f"[...document.querySelectorAll('#tensors tbody tr')].map(r => r.cells[{number}].textContent)"
    )
    return texts


def test_it_sorts_by_number_and_leaves_what_was_not_measured_last(opened: Page) -> None:
    press(opened, "heterogeneity")
    assert column(opened, 5) == ["∞", "2", "0.5", "0.1", "", ""]
    press(opened, "heterogeneity")
    assert column(opened, 5) == ["0.1", "0.5", "2", "∞", "", ""]
    assert opened.evaluate("document.querySelectorAll('#tensors [aria-sort=ascending]').length") == 1


def test_it_sorts_by_name(opened: Page) -> None:
    press(opened, "tensor")
    up = column(opened, 0)
    press(opened, "tensor")
    assert column(opened, 0) == up[::-1]


def test_it_filters_by_name_and_by_treatment(opened: Page) -> None:
    opened.evaluate("query.value = 'LAYERS up'; query.dispatchEvent(new Event('input'))")
    assert opened.evaluate(NAMES) == [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)]
    opened.evaluate("treatment.value = 'homogeneous'; treatment.dispatchEvent(new Event('input'))")
    assert opened.evaluate(NAMES) == ["model.layers.0.mlp.up_proj.weight"]
    assert opened.evaluate("shown.textContent") == "1 of 6"
    opened.evaluate("query.value = treatment.value = ''; query.dispatchEvent(new Event('input'))")
    assert len(opened.evaluate(NAMES)) == 6


def test_it_shows_the_spectrum_that_is_chosen(opened: Page) -> None:
    visible = "[...document.querySelectorAll('#spectra > div:not([hidden])')].map(panel => panel.id)"
    assert opened.evaluate(visible) == ["spectrum-0"]
    opened.evaluate("spectrum.value = 'spectrum-2'; spectrum.dispatchEvent(new Event('input'))")
    assert opened.evaluate(visible) == ["spectrum-2"]


def test_every_picture_is_drawn(opened: Page) -> None:
    boxes = opened.evaluate(
        "[...document.querySelectorAll('figure svg')].filter(s => s.checkVisibility())"
        ".map(s => s.getBoundingClientRect().height)"
    )
    assert len(boxes) == 6
    assert all(height > 100 for height in boxes)


def test_a_hostile_name_is_text(opened: Page) -> None:
    assert opened.evaluate("document.title").endswith("[31m.yml - merge inspection")
    assert f"{printable(HOSTILE)}.weight" in opened.evaluate(NAMES)
    assert opened.evaluate("document.scripts.length") == 1


def test_it_fits_a_phone(page: Page, file: Path) -> None:
    page.open(file, **PHONE)  # type: ignore[arg-type]
    assert page.evaluate("document.scrollingElement.scrollWidth") <= PHONE["width"]
    assert page.evaluate("parseFloat(getComputedStyle(document.body).fontSize)") >= 16
    # Pictures are as wide as the screen at the most, so that nobody has to scroll within one.
    edges = page.evaluate("[...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect().right)")
    assert max(edges) <= PHONE["width"]
    # Text in the pictures is at least this many pixels high, whatever the width of the screen.
    heights = page.evaluate(
        "[...document.querySelectorAll('figure svg text')].filter(t => t.checkVisibility())"
        ".map(t => Math.min(t.getBoundingClientRect().height, t.getBoundingClientRect().width + 99))"
    )
    assert min(heights) > 8
    assert page.complaints() == []
