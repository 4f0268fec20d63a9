"""Findings of real reports: every sentence is about what was merged, and every remedy is one that the method has."""

import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.options import MergeOptions

import mergekit_ace
from mergekit_ace.methods import advice
from mergekit_ace.recipe.planning import planned
from mergekit_ace.recipe.reading import read_recipe
from mergekit_ace.report.advice import advise
from mergekit_ace.report.inspection import assemble, inspect_tensors
from mergekit_ace.report.model import Report
from mergekit_ace.report.wording import label
from mergekit_ace.tensor_treatment import HEAD_REASON
from tests.checkpoints import Suite, Update, add_adapter, make_suite
from tests.commands import mergekit_yaml
from tests.report.recipes import document, write

METHODS = {method.name: method for method in mergekit_ace.METHODS}
# The attention of one layer: three square matrices are as good as all of the model, and quicker.
SOME = re.compile(r"layers\.1\.self_attn\.[qkv]_proj")


@pytest.fixture(scope="module")
def fine_tunes(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    return make_suite("llama", tmp_path_factory.mktemp("full"), update=Update.EVEN, scale=0.01)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Suite, Sequence[str]]:
    """Three adapters, each from a random `A` of its own, and `base+adapter` for each."""
    folder = tmp_path_factory.mktemp("adapters")
    suite = make_suite("llama", folder, experts=1, update=Update.FROZEN)
    targets = ["q_proj", "k_proj", "v_proj"]
    made = [add_adapter(suite.base.path, folder / f"adapter{t}", rank=2, targets=targets, seed=t) for t in range(3)]
    return suite, [f"{suite.base.path}+{adapter}" for adapter in made]


def inspected(recipe: dict[str, Any], folder: Path, **options: Any) -> Report:
    file = write(recipe, folder / "recipe.yml")
    with planned(read_recipe(file), MergeOptions(lora_merge_cache=str(folder / "cache"), **options)) as plan:
        tensors = [tensor for tensor in plan.tensors if SOME.search(tensor.name)]
        return assemble(plan, inspect_tensors(plan, tensors, "full"), "full", selection="some")


def hold(report: Report) -> None:
    """No words for missing numbers, tensors that were merged, parameters that the method has."""
    known = {parameter.name for parameter in METHODS[report.method].parameters} | {"dtype", "scale_free"}
    for finding in advise(report):
        assert not re.search(r"\b(?:inf|nan|None)\b", finding.what + finding.remedy)
        name = finding.what.partition(": ")[0]
        assert name in {tensor.name for tensor in report.tensors} or " a mean loss " in name
        settings = re.findall(r"\b([a-z]+(?:_[a-z]+)+|lambda|epsilon|dtype|matrices)\b", finding.remedy)
        assert settings
        assert set(settings) <= known


@pytest.mark.parametrize(("scale", "named"), [(0.0003, True), (0.01, False)])
def test_updates_below_the_steps_of_bfloat16_are_named(scale: float, named: bool, tmp_path: Path) -> None:
    suite = make_suite("llama", tmp_path, dtype=torch.bfloat16, update=Update.EVEN, scale=scale)
    report = inspected(document(suite, merge_method="ace", parameters={}), tmp_path)
    hints = [finding.what for finding in advise(report) if finding.level == "hint"]
    assert [hint.partition(" has ")[0] for hint in hints] == [f"expert{t}" for t in range(3) if named]
    shares = [expert.rounding_share or 0.0 for tensor in report.tensors for expert in tensor.experts]
    assert (min(shares) > 1 / 3) if named else (max(shares) < 1 / 4)


@pytest.mark.parametrize("method", METHODS)
def test_defaults_on_full_fine_tunes_have_no_findings(method: str, fine_tunes: Suite, tmp_path: Path) -> None:
    report = inspected(document(fine_tunes, merge_method=method, parameters={}), tmp_path)
    assert [tensor.treatment for tensor in report.tensors] == ["merged"] * 3
    assert advise(report) == ()


@pytest.mark.parametrize("method", METHODS)
def test_adapters_that_the_default_averages_are_a_finding(
    method: str, adapters: tuple[Suite, Sequence[str]], tmp_path: Path
) -> None:
    suite, experts = adapters
    models = [{"model": expert} for expert in experts]
    recipe = document(suite, merge_method=method, parameters={}, models=models)
    report = inspected(recipe, tmp_path, lora_merge_dtype="float32")
    averaged = [finding for finding in advise(report) if "low rank" in finding.what]
    assert len(averaged) == (method == "ace")
    for finding in averaged:
        assert re.search(r"correlate by 0(?:\.0\d+)? only", finding.what)
        assert finding.what.endswith("the result is merged without them (3 of 3 merged matrices, this one most)")
        assert "correlation_threshold: 0" in finding.remedy
    labels = [label(tensor) for tensor in report.tensors]
    assert labels == (["uncorrelated"] if method == "ace" else ["merged"]) * 3
    hold(report)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("ace", {"preset": "published"}),
        ("ace", {"preset": "published", "epsilon": 1e4, "heterogeneity_threshold": 0.0}),
        ("ace", {"epsilon": 100.0, "lambda": 0.01}),
        ("actmat", {"epsilon": 1e-12}),
        ("wudi", {"epsilon": 1e6, "lambda": 30.0}),
        ("wudi", {"solver": "adam"}),
        ("tsv_m", {"lambda": 0.01}),
        ("cart", {"lambda": 100.0}),
    ],
)
def test_every_sentence_fits_its_recipe(
    method: str, parameters: dict[str, Any], fine_tunes: Suite, tmp_path: Path
) -> None:
    hold(inspected(document(fine_tunes, merge_method=method, parameters=parameters), tmp_path))


def test_a_dominant_expert_is_named_where_nothing_divides_by_the_traces(tmp_path: Path) -> None:
    suite = make_suite("llama", tmp_path, update=Update.UNEVEN, scale=0.01)
    for method, words in (("actmat", "take wudi"), ("wudi", None), ("ace", None)):
        findings = advise(inspected(document(suite, merge_method=method, parameters={}), tmp_path))
        found = [finding for finding in findings if "of the updates' energy" in finding.what]
        assert bool(found) is (words is not None)
        assert all("expert2 has 92% of the updates' energy" in finding.what for finding in found)
        assert all(words in finding.remedy for finding in found if words)


def test_a_merged_table_is_named(fine_tunes: Suite, tmp_path: Path) -> None:
    file = write(document(fine_tunes, parameters={"embeddings": "ace"}), tmp_path / "recipe.yml")
    with planned(read_recipe(file), MergeOptions()) as plan:
        tables = [tensor for tensor in plan.tensors if "embed" in tensor.name]
        report = assemble(plan, inspect_tensors(plan, tables, "full"), "full")
    (finding,) = (finding for finding in advise(report) if "embedding table" in finding.what)
    assert finding.what.startswith("model.embed_tokens.weight: embeddings: ace merges an embedding table")


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_the_default_s_output_head_is_no_table_that_was_merged(family: str, tmp_path: Path) -> None:
    suite = make_suite(family, tmp_path, update=Update.EVEN, scale=0.01)
    with planned(read_recipe(write(document(suite, parameters={}), tmp_path / "recipe.yml")), MergeOptions()) as plan:
        tables = [tensor for tensor in plan.tensors if tensor.vocabulary_axis is not None]
        report = assemble(plan, inspect_tensors(plan, tables, "full"), "full")
    assert any(tensor.reason == HEAD_REASON and tensor.merge is not None for tensor in report.tensors)
    assert not [finding for finding in advise(report) if "embedding" in finding.what]


@pytest.mark.parametrize("method", ["ace", "wudi", "cart"])
def test_a_log_and_a_report_judge_by_the_same_evidence(
    method: str, fine_tunes: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen: dict[str, list[advice.Evidence]] = {}

    def record(evidence: advice.Evidence) -> None:
        seen.setdefault(evidence.name, []).append(evidence)

    rules = (advice.Rule(cause="none", extent=record, what=str, remedy=str),)  # type: ignore[arg-type]
    monkeypatch.setattr(advice, "RULES", rules)
    monkeypatch.setattr("mergekit_ace.report.advice.RULES", rules)
    recipe = document(fine_tunes, merge_method=method, parameters={"lambda": 0.5})
    with caplog.at_level(logging.INFO, logger="mergekit_ace"):
        mergekit_yaml(recipe, tmp_path / "merged")
    advise(inspected(recipe, tmp_path))
    pairs = [pair for pair in seen.values() if len(pair) == 2]
    assert len(pairs) == 3
    for logged, reported in pairs:
        assert logged.settings == reported.settings
        assert (logged.gate, logged.dtype, logged.method) == (reported.gate, reported.dtype, reported.method)
        assert logged.facts == reported.facts
        assert [name.rpartition("/")[2] for name in logged.experts] == list(reported.experts)
        for one, other in (
            (logged.relative_change, reported.relative_change),
            (logged.relative_to_mean, reported.relative_to_mean),
            (logged.heterogeneity, reported.heterogeneity),
            *zip(logged.energies, reported.energies, strict=True),
        ):
            assert one is not None
            assert other is not None
            assert math.isclose(one, other, rel_tol=1e-6)


def test_bfloat16_copies_of_the_base_are_told_from_updates(tmp_path: Path) -> None:
    suite = make_suite("llama", tmp_path, experts=2, update=Update.ONE, scale=0.01)
    rounded = tmp_path / "rounded"
    copy = make_suite("llama", rounded, experts=2, update=Update.FROZEN)
    from tests.checkpoints import edit_tensors

    with edit_tensors(copy.experts[0].path / "model.safetensors") as tensors:
        for name in list(tensors):
            tensors[name] = suite.base.tensors[name].to(torch.bfloat16).float()
    models = [{"model": str(suite.experts[1].path)}, {"model": str(copy.experts[0].path)}]
    report = inspected(document(suite, models=models, parameters={}), tmp_path)
    (finding,) = advise(report)
    assert finding.what.startswith(f"{copy.experts[0].path} differs from the base by rounding only in every tensor")
