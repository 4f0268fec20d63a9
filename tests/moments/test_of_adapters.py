"""`moments` in recipes of adapters that are merged to an adapter: whose they are, and of which base."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from mergekit_ace.cli import main
from tests.checkpoints import add_adapter, edit_tensors, read_tensors
from tests.moments.conftest import Scene, make_scene

# Updates of norm 1 that a full merge takes from the difference of weights in float32.
_TOLERANCE = 2e-5


@pytest.fixture
def of_adapters(tmp_path: Path) -> Scene:
    """Two adapters under one name, of which each has a layer that the other has not."""
    scene = make_scene(tmp_path)
    models = []
    for seed, targets in enumerate((["q_proj", "up_proj"], ["q_proj", "v_proj"])):
        folder = tmp_path / f"run{seed}" / "adapter"
        add_adapter(scene.suite.base.path, folder, rank=2 + seed, targets=targets, seed=seed)
        models.append({"model": f"{scene.suite.base.path}+{folder}"})
    base = str(scene.suite.base.path)
    scene.recipe.write_text(yaml.safe_dump({"merge_method": "ace", "base_model": base, "models": models}))
    return scene


def command(scene: Scene, name: str, *flags: str, base: str | None = None, **parameters: Any) -> Result:
    text = scene.recipe.read_text()
    document = yaml.safe_load(text if base is None else text.replace(str(scene.suite.base.path), base))
    document["parameters"] = {"moments": str(scene.folder / "moments"), **parameters}
    recipe = scene.folder / "with-moments.yml"
    recipe.write_text(yaml.safe_dump(document))
    arguments = [name, recipe, *([scene.folder / "out"] if name == "merge" else []), *flags]
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def measure(scene: Scene, *experts: int, by: str = "base") -> None:
    arguments: list[object] = ["--by", by]
    for expert in experts:
        model = yaml.safe_load(scene.recipe.read_text())["models"][expert]["model"]
        arguments += ["--prompts", f"{model}={scene.prompts(f'{expert}.txt', start=31 * expert)}"]
    result = scene.measure(*arguments)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("measured", [(0, 1), (0,), (1,)])
def test_the_adapter_adds_what_a_full_merge_with_moments_adds(measured: tuple[int, ...], of_adapters: Scene) -> None:
    """Also where the only adapter of a layer was not measured, and where both have one name."""
    scene = of_adapters
    measure(scene, *measured)
    assert command(scene, "check", "--adapter").exit_code == 0
    result = command(scene, "merge", "--adapter")
    assert result.exit_code == 0, result.output
    model = AutoModelForCausalLM.from_pretrained(scene.suite.base.path)
    before: dict[str, Tensor] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = PeftModel.from_pretrained(model, scene.folder / "out").merge_and_unload().state_dict()
    flags = ("--lora-merge-cache", str(scene.folder / "cache"), "--lora-merge-dtype", "float32", "--overwrite")
    result = command(scene, "merge", "--no-copy-tokenizer", *flags)
    assert result.exit_code == 0, result.output
    for name, tensor in read_tensors(scene.folder / "out").items():
        torch.testing.assert_close(after[name] - before[name], tensor - before[name], atol=_TOLERANCE, rtol=1e-4)


@pytest.mark.parametrize("flags", [("--adapter",), ("--lora-merge-cache",)], ids=["to an adapter", "to a model"])
def test_an_expert_does_not_take_the_moments_of_another_of_its_name(flags: tuple[str, ...], of_adapters: Scene) -> None:
    measure(of_adapters, 0)
    options = flags if flags == ("--adapter",) else (*flags, str(of_adapters.folder / "cache"))
    result = command(of_adapters, "check", *options)
    assert "has no " in result.output
    assert "moments of" in result.output
    assert str(of_adapters.folder / "run1" / "adapter") in result.output.replace("\n", " ")


def assert_refused(scene: Scene, words: str, **options: Any) -> None:
    for name in ("check", "merge", "inspect"):
        result = command(scene, name, "--adapter", **options)
        assert result.exit_code == 1, name
        assert words in result.output.replace("\n", " "), name
    assert not (scene.folder / "out").exists()


def test_moments_of_another_base_are_an_error(of_adapters: Scene) -> None:
    measure(of_adapters, 0, 1)
    base = of_adapters.suite.base.path
    for file in base.glob("*.safetensors"):
        with edit_tensors(file) as tensors:
            for name in tensors:
                tensors[name] = tensors[name] * 1.5
    assert_refused(of_adapters, "of the base is not the weight that the moments in")


def test_moments_of_a_base_of_another_name_are_a_warning(of_adapters: Scene) -> None:
    measure(of_adapters, 0, 1)
    result = command(of_adapters, "check", "--adapter", base="somebody/else-has-it")
    assert result.exit_code == 0, result.output
    output = result.output.replace("\n", " ")
    assert f"were measured on {of_adapters.suite.base.path}; the base of the recipe is somebody/else-has-it" in output


def test_check_finds_what_would_stop_the_merge(of_adapters: Scene) -> None:
    assert_refused(of_adapters, "must be a folder that mergekit-ace moments wrote")
    measure(of_adapters, 0, 1, by="expert")
    assert_refused(of_adapters, "was measured by the experts themselves")


def test_check_names_settings_that_take_no_moments(of_adapters: Scene) -> None:
    measure(of_adapters, 0, 1)
    result = command(of_adapters, "check", "--adapter", preset="published")
    assert result.exit_code == 1
    assert "take no measured ones" in result.output.replace("\n", " ")


def test_fewer_tokens_than_moments_are_made_of_are_no_option(of_adapters: Scene) -> None:
    """The advice was to give more prompts."""
    result = of_adapters.measure("--prompts", f"adapter={of_adapters.prompts('a.txt')}", "--tokens", 8)
    assert result.exit_code == 2
    assert "8 is not in the range x>=32" in result.output
