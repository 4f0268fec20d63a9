"""The tables of quality in README and docs hold what `benchmarks/results` holds."""

import fnmatch
import math
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from benchmarks.experiment.results import Results
from benchmarks.experiment.scoring import relative_mean
from tests.documentation.pages import PAGES, ROOT

RESULTS = ROOT / "benchmarks" / "results"
# What heads a column, where it is not the suite's name.
SUITES = {
    "four": "suite",
    "four fine-tunes of a chat model": "llm-1e-4",
    "twelve fine-tunes of it": "llm-twelve",
    "six LoRA adapters of it": "llm-lora",
    "four adapters": "llm-lora-four",
    "six adapters": "llm-lora",
    "four fine-tunes of a sentence encoder": "encoder",
}
# What names a row, and the benchmark's label; or those of which it is the best.
BEST = {
    "ace, published, best of seven epsilons": "ace published *e-*",
    "task arithmetic, best weight tried": "task arithmetic *",
}
LABELS = {
    "ace": "ace",
    "the default": "ace",
    "ace, length_bound: true": "ace length_bound",
    "length_bound: true": "ace length_bound",
    'ace, preset: "0.1"': "ace 0.1",
    "ace, published (epsilon 1e-2)": "ace published 1e-02",
    "ace, 8 prompts of each task, not data-free": "ace, 8 prompts (not data-free)",
    "ace with 8 prompts of each task, which is not data-free": "ace, 8 prompts (not data-free)",
    "ace, 32 texts that each expert generates (moments.md)": "ace, 32 self-prompts",
    "ace with 32 texts that each expert generates (docs/moments.md)": "ace, 32 self-prompts",
    "ace, no data": "ace",
    "32 texts that each expert generates, no data": "ace, 32 self-prompts",
    "8 prompts with answers": "ace, 8 prompts (not data-free)",
    "32 prompts with answers": "ace, 32 prompts (not data-free)",
    "8 prompts alone": "ace, 8 prompts without answers (not data-free)",
    "8 paragraphs of general text in their place": "ace, 8 general texts (not data-free)",
    "8 prompts of another expert's task": "ace, 8 prompts of another task (not data-free)",
    "wudi": "wudi",
    "wudi, solver: flow": "wudi flow",
    "actmat": "actmat",
    "tsv_m": "tsv_m",
    "tsv_m, Core Space with TSV": "tsv_m",
    "cart": "cart",
    "iso_c": "iso_c",
    "iso_c, Core Space with Iso": "iso_c",
    "iso_cts": "iso_cts",
    "task_arithmetic, weight 0.3": "task arithmetic 0.3",
    "task_arithmetic, weight 0.5": "task arithmetic 0.5",
    "task_arithmetic, weight 1": "task arithmetic 1",
    "ties, density 0.2": "ties 0.2",
    "TIES, density 0.2": "ties 0.2",
    "della, density 0.5": "della 0.5",
    "dare_ties, density 0.5": "dare_ties 0.5",
    "karcher": "karcher",
    "model_stock": "model_stock",
    "linear, plain average": "average",
    "plain average": "average",
    "KnOTS-TIES, density 0.2": "knots_ties 0.2",
    "STAR": "star",
    "Singular Value Calibration": "svc",
    "Consensus TA, weight 0.3": "consensus_ta 0.3",
    "mean weighted by inverse norms (NAN)": "norm weights -1",
    "mean weighted by squared norms (MetaGPT, by matrix)": "norm weights 2",
    "peft cat, weights 1 / T": "peft cat",
    "peft svd, weights 1 / T": "peft svd",
    "peft svd": "peft svd, weight 1",
    "peft ties_svd, density 0.2": "peft ties_svd 0.2",
    "peft dare_ties_svd, density 0.7": "peft dare_ties_svd 0.7",
    "peft magnitude_prune_svd, density 0.5, weights 1 / T": "peft magnitude_prune_svd 0.5",
}
BASE = ("the base", "the base itself")


@cache
def measured(suite: str) -> dict[str, float]:
    found = Results.load(RESULTS / f"quality-{suite}.json")
    percents = {row.label: row.relative_mean for row in found.rows}
    for name, pattern in BEST.items():
        percents[name] = max((percents[label] for label in fnmatch.filter(percents, pattern)), default=math.nan)
    zero = suite.startswith("llm")  # their figure is the share of the gain over the base
    return percents | dict.fromkeys(BASE, 0.0 if zero else relative_mean(found.base, found.experts))


def plain(cell: str) -> str:
    """A cell without emphasis, code marks and links' brackets."""
    return re.sub(r"[*`\[\]]", "", cell).strip()


def cells(page: Path) -> Iterator[tuple[str, str, str]]:
    """Row, suite and number of every cell of a table whose columns are suites."""
    columns: list[str | None] = []
    for line in page.read_text().splitlines():
        if not line.startswith("|"):
            columns = []
            continue
        row = [plain(cell) for cell in line.strip().strip("|").split("|")]
        if not columns:
            suites = [SUITES.get(name, name) for name in row]
            columns = [suite if (RESULTS / f"quality-{suite}.json").is_file() else None for suite in suites]
        for suite, number in zip(columns, row, strict=False):
            if suite is not None and re.fullmatch(r"-?\d+\.\d", number):
                yield row[0], suite, number


TABLES = [page for page in PAGES if any(cells(page))]


def test_there_are_such_tables() -> None:
    checked = [cell for page in TABLES for cell in cells(page) if cell[0] in LABELS]
    assert len(checked) > 200
    assert {ROOT / "README.md", ROOT / "docs" / "quality.md"} < set(TABLES)


@pytest.mark.parametrize("page", TABLES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_table_holds_what_was_measured(page: Path) -> None:
    wrong = [
        f"{row}, {suite}: {number}, measured {found:.1f}"
        for row, suite, number in cells(page)
        if (label := row if row in BASE or row in BEST else LABELS.get(row)) is not None
        if f"{(found := measured(suite).get(label, math.nan)):.1f}" != number
    ]
    assert wrong == []
