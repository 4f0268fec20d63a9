"""Every number of a report against a literal float64 reference, and against the merge itself."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_ace.recipe.planning import planned
from mergekit_ace.recipe.reading import read_recipe
from mergekit_ace.report.inspection import assemble, inspect_recipe, inspect_tensors
from mergekit_ace.report.model import ExpertReport, Report, TensorReport
from mergekit_ace.report.wording import label
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
    with planned(read_recipe(recipe), MergeOptions()) as plan:
        spectra = {tensor.name for tensor in plan.tensors}
        return assemble(plan, inspect_tensors(plan, plan.tensors, "full", spectra=spectra), "full")


def deltas(suite: Suite, name: str) -> dict[str, Tensor]:
    """Task vectors of the experts that changed a tensor, float64, by the name of the expert."""
    base = suite.base.tensors[name].double()
    every = {str(expert.path): expert.tensors[name].double() - base for expert in suite.experts}
    return {expert: delta for expert, delta in every.items() if bool(delta.any())}


def solved(report: Report) -> Iterator[TensorReport]:
    found = [tensor for tensor in report.tensors if tensor.treatment == "merged"]
    assert found
    yield from found


def by_name(tensor: TensorReport) -> Mapping[str, ExpertReport]:
    return {expert.expert: expert for expert in tensor.experts}


def center(delta: Tensor) -> Tensor:
    return delta - delta.mean(dim=0)


def close(value: float, tolerance: float = FLOAT32) -> object:
    return pytest.approx(value, rel=tolerance, abs=1e-7)


def test_every_tensor_is_reported_once_and_takes_its_branch(suite: Suite, report: Report) -> None:
    assert sorted(tensor.name for tensor in report.tensors) == sorted(read_tensors(suite.base.path))
    for tensor in report.tensors:
        update = suite.updates[tensor.name]
        if update is Update.FROZEN:
            assert tensor.treatment == "unchanged"
        elif len(tensor.shape) < 2 or "embed" in tensor.name or "lm_head" in tensor.name:
            assert tensor.treatment == "average"
        elif update is Update.ONE:
            assert tensor.treatment == "single expert"
        else:
            even = update in (Update.EVEN, Update.PARTLY_EVEN)
            assert label(tensor) == ("homogeneous" if even else "heterogeneous")


def test_norms_and_who_is_left_out(suite: Suite, report: Report) -> None:
    for tensor in report.tensors:
        updates = deltas(suite, tensor.name)
        assert [expert.expert for expert in tensor.experts] == list(updates)
        assert {out.expert for out in tensor.left_out} == {str(e.path) for e in suite.experts} - set(updates)
        for expert in tensor.experts:
            assert expert.norm == close(float(updates[expert.expert].norm()))


def test_heterogeneity_shares_and_ridge(suite: Suite, report: Report) -> None:
    for tensor in solved(report):
        updates = deltas(suite, tensor.name)
        energies = {expert: float(delta.square().sum()) for expert, delta in updates.items()}
        logs = torch.tensor(list(energies.values()), dtype=torch.float64).log()
        assert tensor.heterogeneity_published == close(heterogeneity(list(updates.values())))
        assert tensor.heterogeneity == close(float(logs.var()))
        traces = {expert: float(center(delta).square().sum()) for expert, delta in updates.items()}
        n = tensor.shape[1]
        for expert in tensor.experts:
            assert expert.energy_share == close(energies[expert.expert] / sum(energies.values()))
            assert expert.ridge == close(EPSILON * n / traces[expert.expert])


def test_the_ridge_and_the_condition_are_those_of_the_system(suite: Suite, report: Report) -> None:
    for tensor in solved(report):
        grams = [center(delta).T @ center(delta) for delta in deltas(suite, tensor.name).values()]
        scales = [1 / gram.trace() if label(tensor) == "heterogeneous" else 1.0 for gram in grams]
        moments = sum(gram * scale for gram, scale in zip(grams, scales, strict=True))
        ridge = float(sum(EPSILON * scale for scale in scales))
        n = tensor.shape[1]
        assert tensor.merge is not None
        assert tensor.merge.ridge == close(ridge * n / float(moments.trace()))
        system = moments + ridge * torch.eye(n, dtype=torch.float64)
        assert tensor.merge.condition == close(float(torch.linalg.cond(system)), CONDITION)


def test_the_merged_update_and_its_spectrum(suite: Suite, report: Report) -> None:
    for tensor in solved(report):
        updates = list(deltas(suite, tensor.name).values())
        merged = 0.7 * ace(updates, AceOptions(epsilon=EPSILON))
        assert tensor.merged is not None
        assert tensor.merged.norm == close(float(merged.norm()))
        mean_square = sum(float(delta.square().sum()) for delta in updates) / len(updates)
        assert tensor.merged.relative_norm == close(float(merged.norm()) / math.sqrt(mean_square))
        assert tensor.merged.relative_to_mean == close(float(merged.norm() / (sum(updates) / len(updates)).norm()))
        base = suite.base.tensors[tensor.name].double()
        assert tensor.merged.relative_change == close(float(merged.norm() / base.norm()))
        values = torch.linalg.svdvals(merged)
        assert tensor.merged.effective_rank == close(participation(values))
        assert tensor.merged.spectrum is not None
        assert tensor.merged.spectrum.values[0] == close(float(values[0]))
        assert tensor.merge is not None
        assert tensor.merge.decision is not None
        if label(tensor) == "heterogeneous":
            before = 0.7 * ace(updates, AceOptions(epsilon=EPSILON, spectral_fraction=0.0))
            assert tensor.merged.spectrum_before is not None
            assert tensor.merged.spectrum_before.values[0] == close(float(torch.linalg.svdvals(before)[0]))
            assert tensor.merge.refinement_norm == close(float((merged - before).norm()) / 0.7)
            assert tensor.merge.decision.refined_directions == math.floor(0.3 * min(tensor.shape))
        else:
            assert tensor.merged.spectrum_before is None
            assert tensor.merge.decision.refined_directions == 0


def test_losses_ranks_and_interference(suite: Suite, report: Report) -> None:
    for tensor in solved(report):
        updates = deltas(suite, tensor.name)
        merged = 0.7 * ace(list(updates.values()), AceOptions(epsilon=EPSILON))
        grams = {expert: delta.T @ delta for expert, delta in updates.items()}
        for name, expert in by_name(tensor).items():
            delta = updates[name]
            missed = (merged - delta) @ delta.T
            assert expert.loss == close(float(missed.square().sum() / (delta @ delta.T).square().sum()))
            assert expert.effective_rank == close(participation(torch.linalg.svdvals(delta)))
            assert expert.spectrum is not None
            assert expert.spectrum.values[0] == close(float(torch.linalg.svdvals(delta)[0]))
        assert tensor.interference is not None
        for s, (one, first) in enumerate(updates.items()):
            for t, (other, second) in enumerate(updates.items()):
                overlap = (grams[one] * grams[other]).sum() / (grams[one].norm() * grams[other].norm())
                alignment = (first * second).sum() / (first.norm() * second.norm())
                assert tensor.interference.overlap[s][t] == close(float(overlap))
                assert tensor.interference.alignment[s][t] == pytest.approx(float(alignment), abs=1e-5)


def participation(values: Tensor) -> float:
    squares = values.square()
    return float(squares.sum() ** 2 / squares.square().sum())


def test_the_merge_itself_has_the_reported_norms(suite: Suite, recipe: Path, report: Report, tmp_path: Path) -> None:
    merged = read_tensors(mergekit_yaml(recipe.read_text(), tmp_path / "merged"))
    for tensor in report.tensors:
        change = (merged[tensor.name].double() - suite.base.tensors[tensor.name].double()).norm()
        if tensor.treatment in ("merged", "single expert"):
            assert tensor.merged is not None
            assert tensor.merged.norm == close(float(change))
        if tensor.treatment == "unchanged":
            assert change == 0


def test_the_default_preset_is_reported_as_it_merges(suite: Suite, tmp_path: Path) -> None:
    settings = document(suite, parameters={})
    merged = read_tensors(mergekit_yaml(settings, tmp_path / "merged"))
    found = inspect_recipe(write(settings, tmp_path / "recipe.yml"))
    for tensor in solved(found):
        assert tensor.merged is not None
        change = merged[tensor.name].double() - suite.base.tensors[tensor.name].double()
        assert tensor.merged.norm == close(float(change.norm()))
        assert tensor.merged.effective_rank == close(participation(torch.linalg.svdvals(change)))
        updates = deltas(suite, tensor.name).values()
        energies = torch.stack([delta.square().sum() for delta in updates])
        mean = sum(updates) / len(updates)
        assert tensor.merge is not None
        assert tensor.merge.decision is not None
        assert tensor.merge.decision.effective_experts == close(float(energies.mean() / mean.square().sum()))
        assert 0 < tensor.merge.scale_factor <= 1


def test_the_fast_pass_agrees_with_the_full_one(recipe: Path, report: Report) -> None:
    fast = inspect_recipe(recipe, mode="fast")
    for quick, full in zip(fast.tensors, report.tensors, strict=True):
        assert (quick.name, quick.treatment, quick.gate) == (full.name, full.treatment, full.gate)
        assert (quick.heterogeneity, quick.parameters) == (full.heterogeneity, full.parameters)
        assert [(e.expert, e.norm, e.energy_share) for e in quick.experts] == [
            (e.expert, e.norm, e.energy_share) for e in full.experts
        ]
        assert quick.merge is quick.merged is quick.interference is None


def test_spectra_are_measured_where_they_are_asked_for(recipe: Path, report: Report) -> None:
    asked = next(solved(report)).name
    with planned(read_recipe(recipe), MergeOptions()) as plan:
        tensors = [tensor for tensor in plan.tensors if tensor.name.startswith(asked.rpartition(".")[0][:14])]
        found = list(inspect_tensors(plan, tensors, "full", spectra={asked}))
    assert len(found) > 1
    with_spectra = [t.name for t in found if any(e.spectrum for e in t.experts) or (t.merged and t.merged.spectrum)]
    assert with_spectra == [asked]
