"""LoRA experts in mergekit's cache: whole or not there, so that a rerun finds nothing half done."""

from pathlib import Path

import peft
import pytest
import yaml

from tests.checkpoints import Suite, add_adapter, read_tensors
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
    entries = {path.name for path in (tmp_path / "our-cache").iterdir()}
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
