"""What an inspection says of recipes with measured second moments."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor

from mergekit_ace.cli import main
from mergekit_ace.matrix.expert import MeasuredMoment
from mergekit_ace.moments.index import read_index
from mergekit_ace.report.against_measured import against_measured
from tests.checkpoints import Update, add_adapter, read_tensors
from tests.moments.conftest import Make, Scene


def by_hand(update: Tensor, moment: Tensor, merged: Tensor) -> tuple[float, float]:
    """Loss and correlation, literally, in float64."""
    update, moment, merged = update.double(), moment.double(), merged.double()
    identity = torch.eye(update.shape[1], dtype=torch.float64) / update.shape[1]
    missed = merged - update
    loss = torch.trace(missed @ moment @ missed.T) / torch.trace(update @ moment @ update.T)
    estimate = update.T @ update
    estimate = estimate / torch.trace(estimate) - identity
    moment = moment / torch.trace(moment) - identity
    return float(loss), float((estimate * moment).sum() / (estimate.norm() * moment.norm()))


@pytest.mark.parametrize("shape", [(5, 9), (12, 9)])
def test_loss_and_correlation_are_those_of_their_definition(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    update, merged = (torch.randn(shape, generator=generator) for _ in range(2))
    factor = torch.randn(7, shape[1], generator=generator) * torch.linspace(3, 0.1, shape[1])
    squared = float((update.T @ update).square().sum())
    found = against_measured(
        MeasuredMoment(factor=factor, error=0.1, tokens=9), update, merged - update, squared=squared
    )
    assert (found.loss, found.correlation) == pytest.approx(by_hand(update, factor.T @ factor, merged), rel=1e-5)


def test_an_estimate_that_is_right_correlates_by_one() -> None:
    update = torch.randn(12, 9, generator=torch.Generator().manual_seed(0))
    squared = float((update.T @ update).square().sum())
    found = against_measured(
        MeasuredMoment(factor=3 * update, error=0.1, tokens=9), update, update * 0, squared=squared
    )
    assert (found.loss, found.correlation) == pytest.approx((0, 1), abs=1e-6)


def test_what_has_no_direction_or_no_response_has_no_number() -> None:
    """A moment that is a multiple of the identity correlates with nothing; one that the update does not respond to."""
    update = torch.zeros(4, 6)
    update[:, :2] = 1.0
    identity = MeasuredMoment(factor=torch.eye(6), error=0.1, tokens=9)
    assert against_measured(identity, update, update, squared=64.0).correlation is None
    elsewhere = MeasuredMoment(factor=torch.eye(6)[4:], error=0.1, tokens=9)
    assert against_measured(elsewhere, update, update, squared=64.0).loss is None


def inspect(scene: Scene, recipe: dict[str, Any], *flags: str) -> tuple[dict[str, Any], str]:
    """The JSON of a report, and what the terminal shows."""
    file = scene.folder / "inspected.yml"
    file.write_text(yaml.safe_dump(recipe))
    outputs = [f"--{kind}={scene.folder / f'report.{kind}'}" for kind in ("json", "csv", "html")]
    result = CliRunner().invoke(main, ["inspect", str(file), *outputs, "--quiet", *flags])
    assert result.exit_code == 0, result.output
    return json.loads((scene.folder / "report.json").read_text()), result.output


def test_estimates_are_held_against_what_was_measured(make: Make) -> None:
    """Numbers of one expert against the files; the other has none. Tables in the terminal, the CSV and the page."""
    scene = make("llama", update=Update.EVEN, scale=0.1)
    assert scene.measure(f"--prompts=expert1={scene.prompts('a.txt')}").exit_code == 0
    recipe = yaml.safe_load(scene.recipe.read_text()) | {"parameters": {"moments": str(scene.folder / "moments")}}
    report, shown = inspect(scene, recipe)
    merged = scene.folder / "merged"
    assert CliRunner().invoke(main, ["merge", str(scene.folder / "inspected.yml"), str(merged)]).exit_code == 0
    index = read_index(scene.folder / "moments")
    name = "model.layers.1.mlp.up_proj.weight"
    factor = load_file(scene.folder / "moments" / index.experts["expert1"].file)[index.tensors[name].input].double()
    base = scene.suite.base.tensors[name]
    update, result = scene.suite.experts[1].tensors[name] - base, read_tensors(merged)[name] - base
    loss, correlation = by_hand(update, factor.T @ factor, result)
    without, held = next(tensor for tensor in report["tensors"] if tensor["name"] == name)["experts"]
    assert held["measured_loss"] == pytest.approx(loss, rel=1e-3)
    assert held["estimate_correlation"] == pytest.approx(correlation, rel=1e-3)
    assert without["measured_loss"] is without["estimate_correlation"] is None
    assert "estimates against measured" in shown
    assert "measured loss" in shown
    header = next(csv.reader((scene.folder / "report.csv").read_text().splitlines()))
    assert "estimate_correlation expert1" in header
    page = (scene.folder / "report.html").read_text()
    assert "Estimates against measured second moments" in page
    assert "mlp.<wbr>up_proj" in page.partition("Estimates against measured")[2].partition("</section>")[0]


def test_without_moments_nothing_is_said_of_them(scene: Scene) -> None:
    recipe = yaml.safe_load(scene.recipe.read_text())
    report, shown = inspect(scene, recipe)
    assert all(e["measured_loss"] is None for tensor in report["tensors"] for e in tensor["experts"])
    assert "estimates against measured" not in shown
    assert "measured loss" not in shown
    assert "measured_loss" not in (scene.folder / "report.csv").read_text()
    assert "measured second moments" not in (scene.folder / "report.html").read_text()


def test_adapters_are_held_against_the_same(make: Make, tmp_path: Path) -> None:
    """From the factors alone the numbers are those of the full recipe."""
    scene = make("llama")
    models = []
    for seed, name in enumerate(("french", "steps")):
        adapter = add_adapter(scene.suite.base.path, tmp_path / name, rank=4, targets=["q_proj"], seed=seed)
        models.append({"model": f"{scene.suite.base.path}+{adapter}"})
    recipe = yaml.safe_load(scene.recipe.read_text()) | {"models": models, "dtype": "float32"}
    scene.recipe.write_text(yaml.safe_dump(recipe))
    arguments = [f"--prompts=french={scene.prompts('a.txt')}", f"--prompts=steps={scene.prompts('b.txt', start=31)}"]
    assert scene.measure(*arguments).exit_code == 0
    recipe["parameters"] = {"moments": str(scene.folder / "moments")}
    cache = ("--lora-merge-cache", str(tmp_path / "cache"), "--lora-merge-dtype", "float32")
    whole, _ = inspect(scene, recipe, *cache)
    factors, _ = inspect(scene, recipe, "--adapter")
    for tensor in factors["tensors"]:
        other = next(each for each in whole["tensors"] if each["name"] == tensor["name"])
        for one, two in zip(tensor["experts"], other["experts"], strict=True):
            assert one["measured_loss"] == pytest.approx(two["measured_loss"], rel=1e-2)
            assert one["estimate_correlation"] == pytest.approx(two["estimate_correlation"], rel=1e-3)
