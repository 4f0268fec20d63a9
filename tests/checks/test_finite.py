"""NaN and infinity are found by `check`, where they would stop the merge and nowhere else."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_ace.checks import finite
from tests.checkpoints import Suite, Update, edit_tensors, make_suite
from tests.checks.test_check import examine, found
from tests.report.recipes import document

MATRIX, VECTOR, TABLE = "model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    return make_suite("llama", tmp_path_factory.mktemp("llama"), experts=2, update=Update.EVEN, scale=0.05)


def damaged(suite: Suite, folder: Path, names: list[str], value: float, number: int = 0) -> dict[str, Any]:
    """A recipe in whose first expert, or base, these tensors have one bad value."""
    model = suite.base.path if number < 0 else suite.experts[number].path
    copy = Path(shutil.copytree(model, folder / "damaged"))
    with edit_tensors(copy / "model.safetensors") as tensors:
        for name in names:
            tensors[name].view(-1)[-1] = value
    if number < 0:
        return document(suite, base_model=str(copy))
    return document(suite, models=[{"model": str(copy)}, {"model": str(suite.experts[1].path)}])


@pytest.mark.parametrize("number", [-1, 0], ids=["base", "expert"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", [MATRIX, VECTOR, TABLE])
def test_damage_is_named(name: str, value: float, number: int, suite: Suite, tmp_path: Path) -> None:
    errors = found(examine(damaged(suite, tmp_path, [name], value, number), tmp_path), "error")
    assert f"{tmp_path / 'damaged'} holds NaN or infinity in {name} | Repair or replace that checkpoint." in errors


def test_what_the_merge_does_not_read_may_be_damaged(suite: Suite, tmp_path: Path) -> None:
    recipe = damaged(suite, tmp_path, [MATRIX], torch.nan)
    recipe["parameters"] = {"matrices": [{"filter": "up_proj", "value": "base"}, {"value": "ace"}]}
    assert found(examine(recipe, tmp_path), "error") == []
    recipe["parameters"], recipe["models"][0]["parameters"] = {}, {"weight": 0}
    assert found(examine(recipe, tmp_path), "error") == []


def test_of_large_models_the_smallest_tensors_are_read(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = damaged(suite, tmp_path, [TABLE, VECTOR], torch.inf)
    monkeypatch.setattr(finite, "_MOST_BYTES", 20_000)
    (error,) = found(examine(recipe, tmp_path), "error")
    assert f"holds NaN or infinity in {VECTOR} |" in error
