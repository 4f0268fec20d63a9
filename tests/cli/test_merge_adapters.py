"""LoRA experts in mergekit's cache: whole or not there, so that a rerun finds nothing half done."""

from pathlib import Path

import peft
import pytest
import yaml
from click.testing import Result

from mergekit_ace.recipe.adapter_cache import adapter_folder
from tests.checkpoints import Suite, add_adapter, edit_tensors, make_suite, read_tensors
from tests.cli.conftest import Invoke
from tests.commands import mergekit_yaml


@pytest.fixture
def adapter_recipe(suite: Suite, tmp_path: Path) -> Path:
    models = []
    for index, target in enumerate(("q_proj", "up_proj")):
        adapter = add_adapter(suite.base.path, tmp_path / f"adapter{index}", rank=4, targets=[target], seed=index)
        models.append({"model": f"{suite.base.path}+{adapter}"})
    file = tmp_path / "recipe.yml"
    file.write_text(yaml.safe_dump({"merge_method": "ace", "base_model": str(suite.base.path), "models": models}))
    return file


def test_adapters_are_merged_as_mergekit_yaml_does(adapter_recipe: Path, tmp_path: Path, invoke: Invoke) -> None:
    flags = ("--quiet", "--lora-merge-dtype", "float32", "--lora-merge-cache")
    theirs = mergekit_yaml(adapter_recipe.read_text(), tmp_path / "theirs", *flags, str(tmp_path / "cache"))
    result = invoke("merge", adapter_recipe, tmp_path / "ours", *flags, tmp_path / "our-cache")
    assert result.exit_code == 0, result.output
    expected, actual = read_tensors(theirs), read_tensors(tmp_path / "ours")
    assert all(tensor.equal(actual.pop(name)) for name, tensor in expected.items())
    assert not actual
    entries = {path.name for path in (tmp_path / "our-cache").glob("*/*")}
    assert entries == {path.name for path in (tmp_path / "cache").iterdir()}


def test_an_adapter_that_is_not_merged_to_the_end_is_not_in_the_cache(
    adapter_recipe: Path, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise MemoryError

    arguments = ("merge", adapter_recipe, tmp_path / "out", "--quiet", "--lora-merge-cache", tmp_path / "cache")
    with monkeypatch.context() as patched:
        patched.setattr(peft.PeftModel, "from_pretrained", killed)
        result = invoke(*arguments)
    assert result.exit_code == 1
    assert "out of memory" in result.stderr
    assert list((tmp_path / "cache").iterdir()) == []
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output


def test_an_adapter_that_was_trained_on_is_merged_anew(adapter_recipe: Path, tmp_path: Path, invoke: Invoke) -> None:
    def merge(name: str, cache: str) -> Result:
        flags = ("--quiet", "--lora-merge-dtype", "float32", "--lora-merge-cache", tmp_path / cache)
        result = invoke("merge", adapter_recipe, tmp_path / name, *flags)
        assert result.exit_code == 0, result.output
        return result

    first, again = merge("first", "cache"), merge("again", "cache")
    assert "from the adapter cache" not in first.output
    assert again.output.count("from the adapter cache") == 2
    with edit_tensors(tmp_path / "adapter1" / "adapter_model.safetensors") as tensors:
        for name, tensor in tensors.items():
            if "lora_B" in name:
                tensor.mul_(5)
    retrained = merge("retrained", "cache")
    assert retrained.output.count("from the adapter cache") == 1
    merge("fresh", "other-cache")
    name = "model.layers.0.mlp.up_proj.weight"
    merged = {folder: read_tensors(tmp_path / folder)[name] for folder in ("first", "again", "retrained", "fresh")}
    assert merged["first"].equal(merged["again"])
    assert merged["retrained"].equal(merged["fresh"])
    assert not merged["first"].equal(merged["fresh"])


def test_another_base_of_the_same_name_is_another_entry(tmp_path: Path) -> None:
    from mergekit.common import ModelReference
    from mergekit.options import MergeOptions

    options = MergeOptions(lora_merge_cache=str(tmp_path / "cache"))
    suite = make_suite("llama", tmp_path, experts=1)
    adapter = add_adapter(suite.base.path, tmp_path / "adapter", rank=2, targets=["q_proj"])
    model = ModelReference.parse(f"{suite.base.path}+{adapter}")
    before = adapter_folder(model, options)
    assert adapter_folder(model, options) == before
    with edit_tensors(suite.base.path / "model.safetensors") as tensors:
        next(iter(tensors.values())).add_(1)
    assert adapter_folder(model, options) != before
