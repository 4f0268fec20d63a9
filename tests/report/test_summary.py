"""Counting, ranking and advising, on reports whose answer is known; and names cut short."""

import subprocess
import sys
from typing import Any, NamedTuple

import pytest

from mergekit_ace.report.advice import advise
from mergekit_ace.report.model import Report, TensorReport
from mergekit_ace.report.naming import from_layer, place, short_names
from mergekit_ace.report.sampling import sample
from mergekit_ace.report.spectrum import thinned
from mergekit_ace.report.summary import highest_loss, summarize
from mergekit_ace.report.wording import number
from tests.report.made_up import EXPERTS, made_up_report, merged_tensor


def report_of(*tensors: TensorReport, **changes: Any) -> Report:
    return made_up_report().model_copy(update={"tensors": tensors, **changes})


def tensor_with(**changes: Any) -> TensorReport:
    return merged_tensor("model.layers.0.mlp.up_proj.weight", 0, 0.1).model_copy(update=changes)


def with_losses(*losses: float) -> TensorReport:
    experts = [e.model_copy(update={"loss": loss}) for e, loss in zip(tensor_with().experts, losses, strict=True)]
    return tensor_with(experts=tuple(experts))


def test_summary_counts_ranks_and_averages() -> None:
    summary = summarize(made_up_report())
    assert summary.treatments == {"heterogeneous": 3, "homogeneous": 1, "unchanged": 1, "failed": 1}
    assert [tensor.name for tensor in summary.failed] == ["lm_head.weight"]
    assert summary.highest_loss is not None
    assert summary.lowest_loss is not None
    assert (summary.highest_loss.expert, summary.lowest_loss.expert) == (EXPERTS[1], EXPERTS[0])
    assert summary.highest_loss.loss == pytest.approx(0.6)
    assert summary.experts[0].norm == pytest.approx(2.0)  # four tensors of norm 1
    assert summary.ranked == ()  # all four lose the same


def test_the_largest_losses_are_ranked_first() -> None:
    report = report_of(with_losses(0.1, 0.2), with_losses(0.5, 0.6), with_losses(0.3, 0.4))
    assert [highest.loss for t in summarize(report).ranked if (highest := highest_loss(t))] == [0.6, 0.4, 0.2]


@pytest.mark.parametrize("losses", [(0.3, 0.3), (0.30001, 0.30002), (0.0, 0.0)])
def test_ties_have_no_highest_and_no_lowest(losses: tuple[float, float]) -> None:
    tied = with_losses(*losses)
    summary = summarize(report_of(tied, tied))
    assert summary.highest_loss is summary.lowest_loss is highest_loss(tied) is None
    assert summary.ranked == ()


def with_rounding(*shares: float | None) -> TensorReport:
    experts = tensor_with().experts
    return tensor_with(
        experts=tuple(
            expert.model_copy(update={"rounding_share": share, "loss": 0.1})
            for expert, share in zip(experts, shares, strict=True)
        )
    )


def test_an_update_that_is_mostly_rounding_is_a_hint() -> None:
    (finding,) = advise(report_of(with_rounding(0.2, 0.0), with_rounding(0.6, 0.4), with_rounding(None, None)))
    assert finding.level == "hint"
    assert finding.what.startswith("plain has 40% of its update's energy from rounding")
    assert "out_dtype: float32" in finding.remedy
    assert advise(report_of(with_rounding(0.3, 0.3))) == ()
    assert advise(report_of(with_rounding(None, None))) == ()


def test_a_tensor_that_fails_is_an_error() -> None:
    (finding,) = advise(report_of(tensor_with(error="NaN in expert a", treatment="failed")))
    assert (finding.level, "cannot be merged: NaN in expert a" in finding.what) == ("error", True)


def test_an_expert_that_changes_nothing_is_an_error_once_all_is_read() -> None:
    tensor = tensor_with()
    alone = tensor.model_copy(update={"experts": tensor.experts[:1], "treatment": "single expert"})
    (finding,) = advise(report_of(alone))
    assert finding.level == "error"
    assert finding.what == f"{EXPERTS[1]} equals the base in every tensor, so it adds nothing"
    assert advise(report_of(alone, complete=False)) == ()
    (some,) = advise(report_of(alone, selection="Measured 1 of 6 tensors."))
    assert (some.level, "in every tensor that was measured" in some.what) == ("warning", True)


def test_an_expert_that_gains_nothing_is_named() -> None:
    (finding,) = advise(report_of(with_losses(1.2, 0.1), with_losses(0.9, 0.2)))
    assert finding.what.startswith("plain has a mean loss of 1.05")
    assert "larger weight" in finding.remedy
    assert advise(report_of(with_losses(0.99, 0.1))) == ()
    (finding,) = advise(report_of(with_losses(3.0, 2.0)))
    assert finding.what.startswith("every expert has a mean loss above 1 (the smallest is 2)")
    assert "lambda" in finding.remedy


def test_a_sound_merge_has_no_findings() -> None:
    assert advise(report_of(tensor_with())) == ()


class Named(NamedTuple):
    name: str


@pytest.mark.parametrize(
    ("count", "layers"),
    [(1, [4]), (2, [0, 9]), (3, [0, 4, 9]), (10, list(range(10))), (99, list(range(10)))],
)
def test_a_sample_is_spread_over_the_depth_of_every_layer_type(count: int, layers: list[int]) -> None:
    names = [Named(f"model.layers.{i}.{kind}.weight") for i in range(10) for kind in ("q_proj", "up_proj")]
    chosen = sample([Named("embed.weight"), *names, Named("head.weight")], count)
    expected = [f"model.layers.{i}.{kind}.weight" for i in layers for kind in ("q_proj", "up_proj")]
    assert [tensor.name for tensor in chosen] == ["embed.weight", *expected, "head.weight"]


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


def test_measuring_does_not_import_matplotlib() -> None:
    script = (
        "import sys; sys.modules['matplotlib'] = None; "
        "from mergekit_ace.report import advise, inspect_recipe, summarize, write_csv, write_json"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_public_names_are_there() -> None:
    import mergekit_ace.report as report

    assert all(getattr(report, name) is not None for name in report.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        report.no_such_name  # noqa: B018
