"""A report as one self-contained page: no network, pictures inline, everything from checkpoints escaped."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape as escape_html
from importlib.resources import files
from pathlib import Path
from string import Template

from matplotlib import rc_context
from matplotlib.figure import Figure

from mergekit_ace.printable import printable
from mergekit_ace.recipe.findings import Finding
from mergekit_ace.report.advice import advise
from mergekit_ace.report.model import Branch, LayerReport, Report
from mergekit_ace.report.naming import short_names
from mergekit_ace.report.plots import FIGURES, figures, layers_to_show, spectra, style
from mergekit_ace.report.summary import Summary, summarize
from mergekit_ace.report.wording import BRANCH_MEANING, number, percent

_MOST_SPECTRA = 8
_CAPTIONS: Mapping[str, str] = {
    "heterogeneity-by-depth": "How unlike the experts' updates are. Layers above the threshold are trace-normalized, "
    "and their spectrum is refined.",
    "heterogeneity-by-type": "The same by layer type.",
    "shares-by-depth": "Whose second moments weigh how much, before any trace normalization.",
    "losses-by-depth": "How far the merged update is from each expert's own outputs, under that expert's own second "
    "moment. 0: nothing lost; 1: as far as the base model.",
    "interference": "Left: how much two experts use the same input directions. Right: whether they pull the same way "
    "(1), do not meet (0), or pull apart (-1). Means over all layers.",
}


def to_html(report: Report, spectra_of: Sequence[LayerReport] | None = None) -> str:
    """The page.

    Args:
        report: complete or not.
        spectra_of: layers to choose from in the spectra's menu; the refined and the worst ones when None.
    """
    summary = summarize(report)
    assets = files("mergekit_ace.report") / "page"
    chosen = list(spectra_of) if spectra_of is not None else layers_to_show(report, _MOST_SPECTRA)
    drawn = figures(report)
    return Template((assets / "page.html").read_text(encoding="utf-8")).substitute(
        style=(assets / "page.css").read_text(encoding="utf-8"),
        script=(assets / "page.js").read_text(encoding="utf-8"),
        title=escape(Path(report.recipe).name),
        facts=_facts(report, summary),
        findings=_findings(advise(report), complete=report.complete),
        branches=_branches(summary),
        experts=_experts(summary, report),
        figures="".join(_figure(name, drawn[name]) for name in FIGURES if name in drawn and name in _CAPTIONS),
        spectra=_spectra(chosen, report.experts),
        kinds="".join(f"<option>{escape(branch)}</option>" for branch in summary.branches),
        header="".join(f'<th scope="col"><button type="button">{title}</button></th>' for title in _COLUMNS),
        rows="".join(_row(layer) for layer in report.layers),
        count=len(report.layers),
        producer=escape(report.producer),
    )


def write_html(report: Report, file: Path, spectra_of: Sequence[LayerReport] | None = None) -> None:
    """Write `to_html` to a file."""
    file.write_text(to_html(report, spectra_of), encoding="utf-8")


def _facts(report: Report, summary: Summary) -> str:
    facts = [
        ("method", report.method),
        ("base", report.base or "none"),
        ("experts", str(len(report.experts))),
        ("tensors", str(len(report.layers))),
        ("pass", "norms and traces (fast)" if report.mode == "fast" else "full"),
        ("time", f"{summary.seconds:.1f} s"),
    ]
    listed = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    notes = [report.note] if report.note else []
    if not report.complete:
        notes.append("Interrupted: this page holds what was measured until then, in the order of the model.")
    return f"<dl>{listed}</dl>" + "".join(f'<p class="note">{escape(note)}</p>' for note in notes)


def _findings(findings: Iterable[Finding], *, complete: bool) -> str:
    listed = "".join(
        f'<li class="{finding.level}"><b>{finding.level}</b> {escape(finding.what)}.'
        f"<span>{escape(finding.remedy)}</span></li>"
        for finding in findings
    )
    if listed:
        return f'<ul class="findings">{listed}</ul>'
    return '<p class="quiet">Nothing to act on.</p>' if complete else ""


def _branches(summary: Summary) -> str:
    return "".join(
        f'<li class="{_class(branch)}"><b>{count}</b>{escape(branch)}<span>{escape(BRANCH_MEANING[branch])}</span></li>'
        for branch, count in summary.branches.items()
    )


def _experts(summary: Summary, report: Report) -> str:
    short = short_names(report.experts)
    rows = []
    for expert in summary.experts:
        loss = "" if expert.loss is None else f"{_bar(expert.loss)}{number(expert.loss)}"
        rows.append(
            f'<tr><th scope="row" title="{escape(expert.expert)}">{escape(short[expert.expert])}</th>'
            f"<td>{expert.layers}</td><td>{number(expert.norm)}</td>"
            f"<td>{_bar(expert.trace_share)}{percent(expert.trace_share)}</td><td>{loss}</td></tr>"
        )
    return "".join(rows)


def _bar(share: float) -> str:
    return f'<i class="bar" style="--share:{min(max(share, 0.0), 1.0):.3f}"></i>'


def _figure(name: str, figure: Figure) -> str:
    return f'<figure id="{name}"><div>{_svg(figure, name)}</div><figcaption>{_CAPTIONS[name]}</figcaption></figure>'


def _spectra(layers: Sequence[LayerReport], experts: Sequence[str]) -> str:
    with style():
        drawn = [(layer, spectra([layer], experts)) for layer in layers]
    panels = [(layer, figure) for layer, figure in drawn if figure is not None]
    if not panels:
        return ""
    options = "".join(
        f'<option value="spectrum-{index}">{escape(layer.name)}</option>' for index, (layer, _) in enumerate(panels)
    )
    pictures = "".join(
        f'<div id="spectrum-{index}"{"" if index == 0 else " hidden"}>{_svg(figure, f"spectrum-{index}")}</div>'
        for index, (_, figure) in enumerate(panels)
    )
    return (
        '<figure id="spectra"><label>Spectrum of <select id="spectrum">'
        f"{options}</select></label>{pictures}"
        "<figcaption>Singular values of the experts' updates and of the merged one, before and after spectral "
        "refinement.</figcaption></figure>"
    )


_METADATA = re.compile(r"<metadata>.*?</metadata>", re.DOTALL)
_SIZE = re.compile(r'(<svg[^>]*?) width="[^"]*"([^>]*?)', re.DOTALL)
_HEIGHT = re.compile(r'(<svg[^>]*?) height="[^"]*"', re.DOTALL)
_ID = re.compile(r'( id="|url\(#|href="#)')


def _svg(figure: Figure, name: str) -> str:
    """The figure as an element of the page: scales with it, and shares no id with the other figures."""
    file = io.StringIO()
    with style(), rc_context({"svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = _METADATA.sub("", text[text.index("<svg") :])
    text = _HEIGHT.sub(r"\1", _SIZE.sub(r"\1\2", text, count=1), count=1)
    return _ID.sub(rf"\g<1>{name}-", text).replace("<svg", '<svg role="img"', 1)


def _number_of(value: float | None) -> tuple[str, float | None]:
    return ("" if value is None else number(value)), value


_COLUMNS = (
    "tensor",
    "branch",
    "shape",
    "experts",
    "heterogeneity",
    "scale-free",
    "ridge",
    "condition",
    "norm",
    "top 5 %",
    "loss",
    "worst for",
)


def _row(layer: LayerReport) -> str:
    hurt = max((e for e in layer.experts if e.loss is not None), key=lambda e: e.loss or 0.0, default=None)
    losses = [expert.loss for expert in layer.experts if expert.loss is not None]
    merged = layer.merged
    reason = layer.error or "; ".join(
        [layer.reason, *(f"{out.expert} left out: {out.reason}" for out in layer.left_out)]
    )
    names = short_names([expert.expert for expert in layer.experts])
    cells = [
        _cell(layer.branch, None, title=reason),
        _cell(" x ".join(map(str, layer.shape)), float(math.prod(layer.shape))),
        _cell(str(len(layer.experts)), float(len(layer.experts))),
        _cell(*_number_of(layer.heterogeneity)),
        _cell(*_number_of(layer.heterogeneity_scale_free)),
        _cell(*_number_of(layer.ridge)),
        _cell(*_number_of(layer.condition)),
        _cell(*_number_of(merged.relative_norm if merged else None)),
        _cell(*_number_of(merged.top_energy if merged else None)),
        _cell(*_number_of(sum(losses) / len(losses) if losses else None)),
        _cell(names[hurt.expert] if hurt and len(layer.experts) > 1 else "", None),
    ]
    return f'<tr class="{_class(layer.branch)}"><th scope="row">{_breakable(layer.name)}</th>{"".join(cells)}</tr>\n'


def _cell(text: str, value: float | None, *, title: str = "") -> str:
    sort = "" if value is None else f' data-value="{value!r}"'
    hover = f' title="{escape(title)}"' if title else ""
    return f"<td{sort}{hover}>{escape(text)}</td>"


def escape(text: str) -> str:
    """Text as it may stand in an element or a quoted attribute."""
    return escape_html(printable(text))


def _breakable(name: str) -> str:
    """A dotted name that a narrow column may break after its dots."""
    return escape(name).replace(".", ".<wbr>")


def _class(branch: Branch) -> str:
    return branch.replace(" ", "-")
