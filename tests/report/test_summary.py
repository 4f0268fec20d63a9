"""Counting, ranking and advising, on reports whose answer is known; and names cut short."""

import dataclasses
import subprocess
import sys
from typing import Any

import pytest

from mergekit_ace.report.advice import advise
from mergekit_ace.report.model import LayerReport, Report
from mergekit_ace.report.naming import from_layer, place, short_names
from mergekit_ace.report.spectrum import thinned
from mergekit_ace.report.summary import summarize
from mergekit_ace.report.wording import number
from tests.report.made_up import EXPERTS, made_up_report, solved_layer


def report_of(*layers: LayerReport, **changes: Any) -> Report:
    return dataclasses.replace(made_up_report(), layers=layers, **changes)


def layer_with(**changes: Any) -> LayerReport:
    return dataclasses.replace(solved_layer("model.layers.0.mlp.up_proj.weight", 0, 0.1), **changes)


def test_summary_counts_ranks_and_averages() -> None:
    summary = summarize(made_up_report())
    assert summary.branches == {"heterogeneous": 3, "homogeneous": 1, "frozen": 1, "failed": 1}
    assert [layer.name for layer in summary.failed] == ["lm_head.weight"]
    assert summary.most_hurt is not None
    assert summary.least_hurt is not None
    assert (summary.most_hurt.expert, summary.least_hurt.expert) == (EXPERTS[1], EXPERTS[0])
    assert summary.most_hurt.loss == pytest.approx(0.6)
    assert summary.experts[0].norm == pytest.approx(2.0)  # four layers of norm 1
    assert len(summary.worst) == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ridge": 3.0}, "ridge outweighs"),
        ({"condition": 1e8}, "ill-conditioned"),
        ({"branch": "heterogeneous", "heterogeneity": 9.0, "heterogeneity_scale_free": 0.01}, "similar size"),
        ({"error": "NaN in expert a", "branch": "failed"}, "cannot be merged"),
    ],
)
def test_each_trouble_is_named_with_a_remedy(changes: dict[str, Any], words: str) -> None:
    findings = advise(report_of(layer_with(**changes)))
    assert [words in finding.what for finding in findings] == [True]
    assert all(finding.remedy for finding in findings)


def test_norms_that_swell_or_shrink_are_named() -> None:
    layer = layer_with()
    assert layer.merged is not None
    for changes, words in (({"relative_change": 0.4}, "by 40%"), ({"relative_norm": 0.1}, "0.25 times")):
        changed = dataclasses.replace(layer, merged=dataclasses.replace(layer.merged, **changes))
        assert [words in finding.what for finding in advise(report_of(changed))] == [True]


def test_a_dominant_expert_is_named() -> None:
    layer = layer_with()
    experts = tuple(
        dataclasses.replace(expert, trace_share=share)
        for expert, share in zip(layer.experts, (0.95, 0.05), strict=True)
    )
    (finding,) = advise(report_of(dataclasses.replace(layer, experts=experts)))
    assert finding.what.startswith("plain holds 95%")


def test_an_expert_that_changes_nothing_is_an_error_once_all_is_read() -> None:
    layer = layer_with()
    alone = dataclasses.replace(layer, experts=layer.experts[:1])
    (finding,) = advise(report_of(alone))
    assert finding.level == "error"
    assert EXPERTS[1] in finding.what
    assert advise(report_of(alone, complete=False)) == ()


def test_nothing_to_say_about_a_sound_merge() -> None:
    assert advise(report_of(layer_with())) == ()


@pytest.mark.parametrize(
    ("name", "depth", "kind"),
    [
        ("model.layers.3.self_attn.q_proj.weight", 3, "self_attn.q_proj"),
        ("model.layers.3.mlp.experts.7.w1.weight", 3, "mlp.experts.*.w1"),
        ("model.layers.3.mlp.experts.gate_up_proj[7]", 3, "mlp.experts.gate_up_proj"),
        ("transformer.h.0.ln_1.bias", 0, "ln_1.bias"),
        ("lm_head.weight", None, "lm_head"),
        ("blocks.2.0.conv1.weight", 2, "*.conv1"),
    ],
)
def test_places(name: str, depth: int | None, kind: str) -> None:
    assert place(name) == (depth, kind)


def test_short_names_stay_apart() -> None:
    assert short_names(["/a/math", "/a/code/", "base+/x/lora"]) == {
        "/a/math": "math",
        "/a/code/": "code",
        "base+/x/lora": "lora",
    }
    assert short_names(["/a/1/ckpt", "/a/2/ckpt"]) == {"/a/1/ckpt": "1/ckpt", "/a/2/ckpt": "2/ckpt"}
    assert short_names([]) == {}
    assert from_layer("model.layers.3.mlp.up.weight") == "3.mlp.up"


def test_spectra_are_thinned_from_end_to_end() -> None:
    import torch

    values = torch.linspace(1000, 1, 1000, dtype=torch.float64)
    thin = thinned(values)
    assert len(thin.ranks) <= 64
    assert (thin.ranks[0], thin.ranks[-1]) == (1, 1000)
    assert thin.values == tuple(float(values[rank - 1]) for rank in thin.ranks)
    assert thinned(torch.ones(1)).ranks == (1,)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.12345, "0.123"), (123.4, "123"), (1.5e-5, "1.5e-5"), (2e7, "2e7"), (float("inf"), "∞")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


def test_measuring_needs_neither_matplotlib_nor_rich() -> None:
    script = (
        "import sys; sys.modules['matplotlib'] = sys.modules['rich'] = None; "
        "from mergekit_ace.report import advise, inspect_recipe, summarize, write_csv, write_json"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_public_names_are_there() -> None:
    import mergekit_ace.report as report

    assert all(getattr(report, name) is not None for name in report.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        report.no_such_name  # noqa: B018
