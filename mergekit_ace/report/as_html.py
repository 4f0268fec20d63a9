"""A report as one self-contained page: no network, pictures inline, everything from checkpoints escaped."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.figure import Figure

from mergekit_ace.printable import printable
from mergekit_ace.report.advice import advise
from mergekit_ace.report.model import Report, TensorReport
from mergekit_ace.report.naming import short_names
from mergekit_ace.report.plots import FIGURES, figures, spectra, style
from mergekit_ace.report.summary import Summary, gate_statistic, highest_loss, mean_loss, summarize
from mergekit_ace.report.wording import MEANING, label, number, optional, percent

_CAPTIONS: Mapping[str, str] = {
    "heterogeneity-by-depth": "Spread of the experts' update norms. Where the method has a gate, matrices above its "
    "threshold are trace-normalized and refined.",
    "heterogeneity-by-type": "The same by layer type.",
    "shares-by-depth": "Each expert's share of the updates' energy, before any trace normalization.",
    "losses-by-depth": "Interference of the merged update with each expert, relative to the base. 0: the expert's "
    "outputs are kept; 1: as far from them as the base model.",
    "interference": "Overlap: how much two experts use the same input directions. Alignment: cosine between their "
    "updates; 0 where they are orthogonal, negative where they oppose each other. Means over all merged matrices.",
}


def to_html(report: Report) -> str:
    """The page."""
    assets = files("mergekit_ace.report") / "page"
    drawn = figures(report)
    summary = summarize(report)
    return _environment().get_template("page.html.j2").render(
        report=report,
        summary=summary,
        title=Path(report.recipe).name,
        facts=_facts(report, summary),
        notes=list(_notes(report)),
        findings=advise(report),
        short=short_names(report.experts),
        meaning=MEANING,
        pictures=[
            (name, _svg(drawn[name], name), _CAPTIONS[name]) for name in FIGURES if name in drawn and name in _CAPTIONS
        ],
        spectra=list(_spectra(report)),
        columns=_COLUMNS,
        rows=[_row(tensor) for tensor in report.tensors],
        style=Markup((assets / "page.css").read_text(encoding="utf-8")),
        script=Markup((assets / "page.js").read_text(encoding="utf-8")),
    )  # fmt: skip


def write_html(report: Report, file: Path) -> None:
    """Write `to_html` to a file."""
    file.write_text(to_html(report), encoding="utf-8")


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("mergekit_ace.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(breakable=breakable, css_class=_css_class, number=number, percent=percent)
    return environment


def _css_class(words: str) -> str:
    return words.replace(" ", "-")


def _shown(value: Any) -> Any:
    """Control characters of a name spelled out; what is escaped already is left alone."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


# Between two words, not within a number.
_AFTER_DOT = re.compile(r"(?<=\w)\.(?=[A-Za-z_])|(?<=[A-Za-z_])\.(?=\d)|(?<=\w)/(?=\w)")


def breakable(text: str) -> Markup:
    """A text whose dotted names and paths a narrow column may break after a dot or a slash, and nowhere else."""
    return Markup(_AFTER_DOT.sub(lambda found: f"{found.group()}<wbr>", str(escape(printable(text)))))


def _facts(report: Report, summary: Summary) -> list[tuple[str, str]]:
    measured = len(report.tensors)
    return [
        ("method", report.method),
        ("base", report.base or "none"),
        ("experts", str(len(report.experts))),
        ("tensors", str(measured) if report.selection is None else f"{measured} measured, of {report.planned}"),
        ("pass", "norms (fast)" if report.mode == "fast" else "full"),
        ("time", f"{summary.seconds:.1f} s"),
    ]


def _notes(report: Report) -> Iterator[str]:
    if report.selection:
        yield report.selection
    if report.note:
        yield report.note
    if not report.complete:
        yield "Interrupted: this page holds what was measured until then, in the order of the model."


def _spectra(report: Report) -> Iterator[tuple[str, Markup]]:
    measured = [tensor for tensor in report.tensors if tensor.merged is not None and tensor.merged.spectrum is not None]
    for index, tensor in enumerate(measured):
        with style():
            figure = spectra([tensor], report.experts)
        assert figure is not None
        yield tensor.name, _svg(figure, f"spectrum-{index}")


_METADATA = re.compile(r"<metadata>.*?</metadata>", re.DOTALL)
_SIZE = re.compile(r'(<svg[^>]*?) width="[^"]*"([^>]*?)', re.DOTALL)
_HEIGHT = re.compile(r'(<svg[^>]*?) height="[^"]*"', re.DOTALL)
_ID = re.compile(r'( id="|url\(#|href="#)')


def _svg(figure: Figure, name: str) -> Markup:
    """The figure as an element of the page: scales with it, and shares no id with the other figures."""
    file = io.StringIO()
    with style(), rc_context({"svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = _METADATA.sub("", text[text.index("<svg") :])
    text = _HEIGHT.sub(r"\1", _SIZE.sub(r"\1\2", text, count=1), count=1)
    # matplotlib escapes the names that it writes.
    return Markup(_ID.sub(rf"\g<1>{name}-", text).replace("<svg", '<svg role="img"', 1))


_COLUMNS = (
    "tensor",
    "treatment",
    "loss",
    "highest for",
    "norm",
    "heterogeneity",
    "ridge",
    "condition",
    "effective rank",
    "experts",
    "shape",
)


class _Cell(NamedTuple):
    text: str
    value: float | None
    """What it is sorted by; None: by its text."""


class _Row(NamedTuple):
    name: str
    label: str
    reason: str
    cells: Sequence[_Cell]
    """Of `_COLUMNS` but the first two."""


def _row(tensor: TensorReport) -> _Row:
    highest = highest_loss(tensor)
    facts, merged = tensor.merge, tensor.merged
    reason = tensor.error or "; ".join(
        [tensor.reason, *(f"{out.expert} left out: {out.reason}" for out in tensor.left_out)]
    )
    names = short_names([expert.expert for expert in tensor.experts])
    cells = [
        _number(mean_loss(tensor)),
        _Cell(names[highest.expert] if highest else "", None),
        _number(merged.relative_norm if merged else None),
        _number(gate_statistic(tensor)),
        _number(facts.ridge if facts else None),
        _number(facts.condition if facts else None),
        _number(merged.effective_rank if merged else None),
        _number(float(len(tensor.experts))),
        _Cell(" x ".join(map(str, tensor.shape)), float(math.prod(tensor.shape))),
    ]
    return _Row(tensor.name, label(tensor), reason, cells)


def _number(value: float | None) -> _Cell:
    return _Cell(optional(value), value)
