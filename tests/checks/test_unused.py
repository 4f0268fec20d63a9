"""Tensors that mergekit's definition of an architecture lacks are named by model: the merge loses them."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from mergekit.options import MergeOptions

from mergekit_ace.checks.whole_recipe import check_recipe
from mergekit_ace.cli import main
from mergekit_ace.recipe.findings import Finding
from tests.checkpoints import Suite, Update, add_adapter, edit_tensors, make_suite, read_tensors
from tests.report.recipes import document, write


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    return make_suite("llama", tmp_path_factory.mktemp("llama"), experts=2, update=Update.EVEN, scale=0.05)


def with_tensors(model: Path, folder: Path, **tensors: torch.Tensor) -> Path:
    shutil.copytree(model, folder)
    with edit_tensors(folder / "model.safetensors") as held:
        held.update({name.replace("__", "."): tensor for name, tensor in tensors.items()})
    return folder


def lost(recipe: dict[str, Any], folder: Path) -> list[Finding]:
    findings = check_recipe(write(recipe, folder / "recipe.yml")).findings
    assert not [finding for finding in findings if finding.level == "error"]
    return [finding for finding in findings if "the merged model will lack" in finding.what]


def test_every_model_is_told_with_what_it_loses(llama: Suite, tmp_path: Path) -> None:
    head = {"v_head__summary__weight": torch.ones(1, 32), "v_head__summary__bias": torch.ones(1)}
    expert = with_tensors(llama.experts[0].path, tmp_path / "expert", **head)
    base = with_tensors(llama.base.path, tmp_path / "base", mtp__0__proj__weight=torch.ones(32, 64))
    recipe = document(
        llama, base_model=str(base), models=[{"model": str(expert)}, {"model": str(llama.experts[1].path)}]
    )
    first, second = lost(recipe, tmp_path)
    assert (first.level, second.level) == ("warning", "warning")
    assert f"{base} has 1 tensor" in first.what
    assert "lack it: mtp.0.proj.weight" in first.what
    assert f"{expert} has 2 tensors" in second.what
    assert "v_head.summary.bias, v_head.summary.weight" in second.what


def test_what_transformers_computes_is_a_hint(llama: Suite, tmp_path: Path) -> None:
    frequencies = {"model__layers__0__self_attn__rotary_emb__inv_freq": torch.ones(4)}
    expert = with_tensors(llama.experts[0].path, tmp_path / "expert", **frequencies)
    (hint,) = lost(document(llama, models=[{"model": str(expert)}]), tmp_path)
    assert hint.level == "hint"


def test_gpt2s_masks_are_computed_and_its_biases_are_not(tmp_path: Path) -> None:
    suite = make_suite("gpt2", tmp_path, experts=1, update=Update.EVEN, scale=0.05)
    mask = {"transformer__h__0__attn__bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8)}
    expert = with_tensors(suite.experts[0].path, tmp_path / "expert", **mask)
    (hint,) = lost(document(suite, models=[{"model": str(expert)}]), tmp_path)
    assert hint.level == "hint"
    expert = with_tensors(suite.experts[0].path, tmp_path / "another", transformer__h__0__attn__bias=torch.ones(8))
    (warning,) = lost(document(suite, models=[{"model": str(expert)}]), tmp_path)
    assert warning.level == "warning"


@pytest.mark.parametrize("family", ["llama-tied", "mixtral", "qwen3-moe", "olmo", "mamba"])
def test_whole_models_lose_nothing(family: str, tmp_path: Path) -> None:
    """Tied heads, experts that mergekit stacks, and architectures that it infers are all used."""
    suite = make_suite(family, tmp_path, experts=1, update=Update.EVEN, scale=0.05)
    assert lost(document(suite), tmp_path) == []


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_layers_that_slices_leave_out_are_meant_to_be(family: str, tmp_path: Path) -> None:
    suite = make_suite(family, tmp_path, experts=1, update=Update.EVEN, scale=0.05)
    models = [str(suite.base.path), str(suite.experts[0].path)]
    slices = [{"sources": [{"model": model, "layer_range": [1, 3]} for model in models]}]
    recipe = {"merge_method": "ace", "base_model": models[0], "slices": slices}
    assert lost(recipe, tmp_path) == []
    with_tensors(suite.experts[0].path, tmp_path / "more", mtp__proj__weight=torch.ones(3, 3))
    slices[0]["sources"][1]["model"] = str(tmp_path / "more")
    (warning,) = lost(recipe, tmp_path)
    assert "lack it: mtp.proj.weight" in warning.what


def test_an_adapter_does_not_repeat_its_base(llama: Suite, tmp_path: Path) -> None:
    base = with_tensors(llama.base.path, tmp_path / "base", mtp__0__proj__weight=torch.ones(32, 64))
    adapter = add_adapter(llama.base.path, tmp_path / "adapter", rank=2, targets=["q_proj"])
    recipe = write(document(llama, base_model=str(base), models=[{"model": f"{base}+{adapter}"}]), tmp_path / "r.yml")
    findings = check_recipe(recipe, MergeOptions(lora_merge_cache=str(tmp_path / "cache"))).findings
    assert sum("will lack" in finding.what for finding in findings) == 1


def merge(recipe: dict[str, Any], folder: Path, *flags: str) -> Result:
    file = write(recipe, folder / "recipe.yml")
    return CliRunner().invoke(main, ["merge", str(file), str(folder / "out"), "--no-copy-tokenizer", *flags])


def test_a_merge_ends_with_what_was_lost_and_strict_does_not_start(llama: Suite, tmp_path: Path) -> None:
    expert = with_tensors(llama.experts[0].path, tmp_path / "expert", visual__proj__weight=torch.ones(2, 3))
    recipe = document(llama, models=[{"model": str(expert)}])
    strict = merge(recipe, tmp_path, "--strict")
    assert strict.exit_code == 1
    assert f"{expert} has 1 tensor" in strict.stderr
    assert not (tmp_path / "out").exists()
    result = merge(recipe, tmp_path)
    assert result.exit_code == 0, result.output
    assert "the merged model will lack it: visual.proj.weight" in result.stderr
    assert "visual.proj.weight" not in read_tensors(tmp_path / "out")


def test_strict_lets_a_merge_run_that_loses_nothing(llama: Suite, tmp_path: Path) -> None:
    frequencies = {"model__layers__0__self_attn__rotary_emb__inv_freq": torch.ones(4)}
    expert = with_tensors(llama.experts[0].path, tmp_path / "expert", **frequencies)
    result = merge(document(llama, models=[{"model": str(expert)}]), tmp_path, "--strict")
    assert result.exit_code == 0, result.output


def test_a_merge_tells_what_mergekit_ignores(llama: Suite, tmp_path: Path) -> None:
    recipe = document(llama, parameters={"epsilom": 3.0})
    assert merge(recipe, tmp_path, "--strict").exit_code == 1
    result = merge(recipe, tmp_path)
    assert result.exit_code == 0, result.output
    assert "ace has no parameter 'epsilom'" in result.stderr
