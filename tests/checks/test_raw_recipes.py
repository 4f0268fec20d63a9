"""Recipes of mergekit-pytorch: files of tensors, compared by their headers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mergekit_ace.checks.whole_recipe import Examination, check_recipe
from mergekit_ace.recipe.findings import Level
from tests.commands import mergekit_pytorch
from tests.report.recipes import write

Tensors = dict[str, Tensor]


def network(seed: int, batches: int = 0) -> Tensors:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4))
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors["1.num_batches_tracked"] += batches
    return tensors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate(("base", "a", "b")):
        save_file(network(seed), tmp_path / f"{name}.safetensors")
    return tmp_path


def recipe(folder: Path, *experts: str, **entries: Any) -> dict[str, Any]:
    models = [{"model": str(folder / expert)} for expert in experts]
    return {"merge_method": "ace", "base_model": str(folder / "base.safetensors"), "models": models} | entries


def examine(document: dict[str, Any], folder: Path) -> Examination:
    return check_recipe(write(document, folder / "recipe.yml"))


def found(examination: Examination, level: Level) -> list[str]:
    return [f"{finding.what} | {finding.remedy}" for finding in examination.findings if finding.level == level]


def test_a_sound_recipe_has_no_findings(folder: Path) -> None:
    document = recipe(folder, "a.safetensors", "b.safetensors")
    assert examine(document, folder).findings == ()
    mergekit_pytorch(document, folder / "out")


def test_its_keys_and_parameters_are_read_too(folder: Path) -> None:
    document = recipe(
        folder, "a.safetensors", dtype="half", tokenizer={"source": "base"}, parameters={"epsilon": 0, "lamda": 1}
    )
    examination = examine(document, folder)
    assert len(found(examination, "error")) == 3
    (warning,) = found(examination, "warning")
    assert "mergekit-pytorch does not read 'tokenizer'" in warning


@pytest.mark.parametrize("dtype", [None, "float32"])  # which mergekit-pytorch gives to floating-point tensors alone
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_counters_of_batches_must_be_equal(suffix: str, dtype: str | None, folder: Path) -> None:
    tensors = network(2, batches=7)
    if suffix == "pt":
        torch.save(tensors, folder / "counted.pt")
    else:
        save_file(tensors, folder / "counted.safetensors")
    document = recipe(folder, "a.safetensors", f"counted.{suffix}", dtype=dtype)
    (error,) = found(examine(document, folder), "error")
    assert "1.num_batches_tracked must be equal in all models" in error
    assert "tensors[NAME] = load_file(BASE)[NAME]" in error
    with pytest.raises(ValueError, match="differs between inputs"):
        mergekit_pytorch(document, folder / "out")


@pytest.mark.parametrize(("token", "wrapper"), [("_orig_mod.", "torch.compile"), ("module.", "DataParallel")])
def test_names_that_a_wrapper_made_longer(token: str, wrapper: str, folder: Path) -> None:
    save_file({token + name: tensor for name, tensor in network(2).items()}, folder / "wrapped.safetensors")
    (error,) = found(examine(recipe(folder, "a.safetensors", "wrapped.safetensors"), folder), "error")
    assert str(folder / "wrapped.safetensors") in error
    assert f"its names hold {token!r}, which {wrapper} puts there" in error
    assert f"name.replace({token!r}, '')" in error


def test_tensors_that_some_lack(folder: Path) -> None:
    tensors = network(2)
    del tensors["3.bias"]
    save_file(tensors, folder / "less.safetensors")
    (error,) = found(examine(recipe(folder, "a.safetensors", "less.safetensors"), folder), "error")
    assert "less.safetensors lacks 3.bias" in error
    assert "--tensor-intersection" in error
    save_file(network(0) | {"4.weight": torch.ones(2)}, folder / "base.safetensors")
    (warning,) = found(examine(recipe(folder, "a.safetensors", "b.safetensors"), folder), "warning")
    assert "has 4.weight, which no expert has" in warning


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_a_training_checkpoint_says_how_to_take_the_tensors_out(key: str, folder: Path) -> None:
    torch.save({"epoch": 3, key: network(2)}, folder / "trained.pt")
    document = recipe(folder, "a.safetensors", "trained.pt")
    (error,) = found(examine(document, folder), "error")
    assert f"trained.pt must hold its tensors by name; it holds epoch, {key}" in error
    assert f"torch.load(FILE)[{key!r}]" in error


def test_other_shapes_and_files_that_are_none(folder: Path) -> None:
    save_file(network(2) | {"3.weight": torch.ones(5, 8)}, folder / "wide.safetensors")
    (error,) = found(examine(recipe(folder, "wide.safetensors"), folder), "error")
    assert "3.weight (5, 8) for (4, 8)" in error
    (folder / "cut.safetensors").write_bytes(b"none")
    (error,) = found(examine(recipe(folder, "cut.safetensors"), folder), "error")
    assert "cut.safetensors must be a whole safetensors file" in error
    (error,) = found(examine(recipe(folder, "nowhere.safetensors"), folder), "error")
    assert "nowhere.safetensors must be a file" in error


def test_a_dtype_that_rounds(folder: Path) -> None:
    (warning,) = found(examine(recipe(folder, "a.safetensors", dtype="bfloat16"), folder), "warning")
    assert "Set dtype: float32 and out_dtype: bfloat16" in warning


@pytest.mark.parametrize("sign", [" ", '"', "@", "+"])
def test_paths_that_mergekit_pytorch_does_not_read(sign: str, folder: Path) -> None:
    other = folder / f"of{sign}mine"
    other.mkdir()
    save_file(network(1), other / "a.safetensors")
    document = recipe(folder, f"of{sign}mine/a.safetensors")
    (error,) = found(examine(document, folder), "error")
    assert f"whose path holds a space, a double quote, @ or +; got {other / 'a.safetensors'}" in error
    with pytest.raises((ValueError, RuntimeError, KeyError)):
        mergekit_pytorch(document, folder / "out")
