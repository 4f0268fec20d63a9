"""Every number of a report against a literal float64 reference, and against the merge itself."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mergekit_ace.report.inspection import inspect_recipe
from mergekit_ace.report.model import ExpertReport, LayerReport, Report
from tests.checkpoints import Suite, Update, make_suite, read_tensors
from tests.commands import mergekit_yaml
from tests.reference import AceOptions, ace, heterogeneity
from tests.report.recipes import document, write

FLOAT32 = 2e-4  # relative; sums of float32 products of a well-conditioned system
CONDITION = 0.05  # the estimate of the condition number
EPSILON = 0.3


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    return make_suite("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def recipe(suite: Suite, tmp_path_factory: pytest.TempPathFactory) -> Path:
    parameters = {"preset": "published", "epsilon": EPSILON, "lambda": 0.7}
    return write(document(suite, parameters=parameters), tmp_path_factory.mktemp("recipe") / "recipe.yml")


@pytest.fixture(scope="module")
def report(recipe: Path) -> Report:
    return inspect_recipe(recipe)


def deltas(suite: Suite, name: str) -> dict[str, Tensor]:
    """Task vectors of the experts that changed a tensor, float64, by the name of the expert."""
    base = suite.base.tensors[name].double()
    every = {str(expert.path): expert.tensors[name].double() - base for expert in suite.experts}
    return {expert: delta for expert, delta in every.items() if bool(delta.any())}


def solved(report: Report) -> Iterator[LayerReport]:
    found = [layer for layer in report.layers if layer.branch in ("heterogeneous", "homogeneous", "method")]
    assert found
    yield from found


def by_name(layer: LayerReport) -> Mapping[str, ExpertReport]:
    return {expert.expert: expert for expert in layer.experts}


def center(delta: Tensor) -> Tensor:
    return delta - delta.mean(dim=0)


def close(value: float, tolerance: float = FLOAT32) -> object:
    return pytest.approx(value, rel=tolerance, abs=1e-7)


def test_every_tensor_is_reported_once_and_takes_its_branch(suite: Suite, report: Report) -> None:
    assert sorted(layer.name for layer in report.layers) == sorted(read_tensors(suite.base.path))
    for layer in report.layers:
        update = suite.updates[layer.name]
        if update is Update.FROZEN:
            assert layer.branch == "frozen"
        elif len(layer.shape) < 2 or "embed" in layer.name or "lm_head" in layer.name:
            assert layer.branch == "average"
        elif update is Update.ONE:
            assert layer.branch == "single expert"
        else:
            even = update in (Update.EVEN, Update.PARTLY_EVEN)
            assert layer.branch == ("homogeneous" if even else "heterogeneous")


def test_norms_and_who_is_left_out(suite: Suite, report: Report) -> None:
    for layer in report.layers:
        updates = deltas(suite, layer.name)
        assert [expert.expert for expert in layer.experts] == list(updates)
        assert {out.expert for out in layer.left_out} == {str(e.path) for e in suite.experts} - set(updates)
        for expert in layer.experts:
            assert expert.norm == close(float(updates[expert.expert].norm()))


def test_heterogeneity_traces_and_ridge(suite: Suite, report: Report) -> None:
    for layer in solved(report):
        updates = deltas(suite, layer.name)
        logs = torch.stack([delta.square().sum() for delta in updates.values()]).log()
        assert layer.heterogeneity == close(heterogeneity(list(updates.values())))
        assert layer.heterogeneity_scale_free == close(float(logs.var()))
        traces = {expert: float(center(delta).square().sum()) for expert, delta in updates.items()}
        n = layer.shape[1]
        for expert in layer.experts:
            assert expert.trace_share == close(traces[expert.expert] / sum(traces.values()))
            assert expert.ridge == close(EPSILON * n / traces[expert.expert])


def test_the_ridge_and_the_condition_are_those_of_the_system(suite: Suite, report: Report) -> None:
    for layer in solved(report):
        grams = [center(delta).T @ center(delta) for delta in deltas(suite, layer.name).values()]
        scales = [1 / gram.trace() if layer.branch == "heterogeneous" else 1.0 for gram in grams]
        moments = sum(gram * scale for gram, scale in zip(grams, scales, strict=True))
        ridge = float(sum(EPSILON * scale for scale in scales))
        n = layer.shape[1]
        assert layer.ridge == close(ridge * n / float(moments.trace()))
        system = moments + ridge * torch.eye(n, dtype=torch.float64)
        assert layer.condition == close(float(torch.linalg.cond(system)), CONDITION)


def test_the_merged_update_and_its_spectrum(suite: Suite, report: Report) -> None:
    for layer in solved(report):
        updates = list(deltas(suite, layer.name).values())
        merged = 0.7 * ace(updates, AceOptions(epsilon=EPSILON))
        assert layer.merged is not None
        assert layer.merged.norm == close(float(merged.norm()))
        mean_square = sum(float(delta.square().sum()) for delta in updates) / len(updates)
        assert layer.merged.relative_norm == close(float(merged.norm()) / math.sqrt(mean_square))
        values = torch.linalg.svdvals(merged)
        assert layer.merged.top_energy == close(top_share(values))
        assert layer.merged.spectrum.values[0] == close(float(values[0]))
        if layer.branch == "heterogeneous":
            before = 0.7 * ace(updates, AceOptions(epsilon=EPSILON, spectral_fraction=0.0))
            assert layer.merged.top_energy_before == close(top_share(torch.linalg.svdvals(before)))
            assert layer.refined_directions == math.floor(0.3 * min(layer.shape))
        else:
            assert layer.merged.top_energy_before is None
            assert layer.refined_directions is None


def test_losses_ranks_and_interference(suite: Suite, report: Report) -> None:
    for layer in solved(report):
        updates = deltas(suite, layer.name)
        merged = 0.7 * ace(list(updates.values()), AceOptions(epsilon=EPSILON))
        grams = {expert: center(delta).T @ center(delta) for expert, delta in updates.items()}
        for name, expert in by_name(layer).items():
            delta, gram = updates[name], grams[name]
            own = torch.trace(delta @ gram @ delta.T)
            assert expert.loss == close(float(torch.trace((merged - delta) @ gram @ (merged - delta).T) / own))
            values = torch.linalg.svdvals(delta)
            shares = values / values.sum()
            assert expert.effective_rank == close(float(torch.exp(-(shares * shares.log()).sum())))
            assert expert.top_energy == close(top_share(values))
        assert layer.interference is not None
        for s, (one, first) in enumerate(updates.items()):
            for t, (other, second) in enumerate(updates.items()):
                overlap = (grams[one] * grams[other]).sum() / (grams[one].norm() * grams[other].norm())
                alignment = (first * second).sum() / (first.norm() * second.norm())
                assert layer.interference.overlap[s][t] == close(float(overlap))
                assert layer.interference.alignment[s][t] == pytest.approx(float(alignment), abs=1e-5)


def top_share(values: Tensor) -> float:
    top = values[: math.ceil(0.05 * len(values))]
    return float(top.square().sum() / values.square().sum())


def test_the_merge_itself_has_the_reported_norms(suite: Suite, recipe: Path, report: Report, tmp_path: Path) -> None:
    merged = read_tensors(mergekit_yaml(recipe.read_text(), tmp_path / "merged"))
    for layer in report.layers:
        change = (merged[layer.name].double() - suite.base.tensors[layer.name].double()).norm()
        if layer.branch in ("heterogeneous", "homogeneous", "single expert"):
            assert layer.merged is not None
            assert layer.merged.norm == close(float(change))
        if layer.branch == "frozen":
            assert change == 0


def test_the_default_preset_is_reported_as_it_merges(suite: Suite, tmp_path: Path) -> None:
    settings = document(suite, parameters={})
    merged = read_tensors(mergekit_yaml(settings, tmp_path / "merged"))
    found = inspect_recipe(write(settings, tmp_path / "recipe.yml"))
    for layer in solved(found):
        assert layer.merged is not None
        change = merged[layer.name].double() - suite.base.tensors[layer.name].double()
        assert layer.merged.norm == close(float(change.norm()))
        assert layer.merged.top_energy == close(top_share(torch.linalg.svdvals(change)))
        updates = deltas(suite, layer.name).values()
        energies = torch.stack([delta.square().sum() for delta in updates])
        mean = sum(updates) / len(updates)
        assert layer.effective_experts == close(float(energies.mean() / mean.square().sum()))
        assert layer.shortening is not None
        assert 0 < layer.shortening <= 1


def test_the_fast_pass_agrees_with_the_full_one(recipe: Path, report: Report) -> None:
    fast = inspect_recipe(recipe, mode="fast")
    for quick, full in zip(fast.layers, report.layers, strict=True):
        assert (quick.name, quick.branch, quick.gate) == (full.name, full.branch, full.gate)
        assert quick.heterogeneity == full.heterogeneity
        assert [(e.expert, e.norm, e.trace_share) for e in quick.experts] == [
            (e.expert, e.norm, e.trace_share) for e in full.experts
        ]
        assert (quick.ridge is None) == (full.ridge is None)
        assert quick.ridge is None or quick.ridge == close(full.ridge or 0.0)
        assert quick.merged is None
        assert quick.interference is None
