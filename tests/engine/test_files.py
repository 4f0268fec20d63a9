"""Configuration, tokenizer and card: mergekit's, without a network, and no model that looks whole without them."""

import itertools
import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from mergekit.card import generate_card
from mergekit.config import MergeConfiguration
from safetensors.torch import save_file

from mergekit_ace.engine.contents import require_each_once
from mergekit_ace.engine.files import card
from mergekit_ace.engine.tensor_file import described
from tests.checkpoints import Suite, make_suite, save_tokenizer
from tests.cli.conftest import Invoke


@pytest.mark.parametrize("method", ["ace", "slerp"])
def test_the_card_is_mergekits(method: str, suite: Suite) -> None:
    recipe = MergeConfiguration.model_validate(
        {
            "merge_method": method,
            "base_model": str(suite.base.path),
            "models": [{"model": str(suite.experts[0].path)}, {"model": "some-owner/a-model+some-owner/an-adapter"}],
        }
    )
    expected = generate_card(config=recipe, config_yaml="text", name="name")
    assert sorted(card(recipe, "text", "name").splitlines()) == sorted(expected.splitlines())


def test_no_network_is_asked_about_names_that_are_on_this_disk(
    tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_suite("llama", tmp_path, experts=2)
    save_tokenizer(tmp_path / "base", 96)
    models = [{"model": "expert0"}, {"model": "expert1"}]
    (tmp_path / "recipe.yml").write_text(
        yaml.safe_dump({"merge_method": "ace", "base_model": "base", "models": models})
    )

    def asked(*_: object, **__: object) -> bool:
        raise ConnectionError("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.repo_exists", asked)
    result = invoke("merge", "recipe.yml", "out", "--quiet")
    assert result.exit_code == 0, result.output
    assert "* expert0\n* expert1" in (tmp_path / "out" / "README.md").read_text()


def _recipe(folder: Path) -> Path:
    suite = make_suite("llama", folder / "models", experts=1)
    recipe = folder / "recipe.yml"
    models = [{"model": str(suite.experts[0].path)}]
    recipe.write_text(yaml.safe_dump({"merge_method": "ace", "base_model": str(suite.base.path), "models": models}))
    return recipe


def test_a_tokenizer_that_cannot_be_copied_is_an_error_before_anything_is_merged(
    tmp_path: Path, invoke: Invoke
) -> None:
    recipe = _recipe(tmp_path)
    (tmp_path / "models" / "base" / "tokenizer.json").write_text("{damaged")
    result = invoke("merge", recipe, tmp_path / "out", "--quiet")
    assert result.exit_code == 1
    assert f"the tokenizer of {tmp_path / 'models' / 'base'} cannot be copied" in result.output
    assert "--no-copy-tokenizer" in result.output
    assert "Traceback" not in result.output
    assert sorted(os.listdir(tmp_path)) == ["models", "recipe.yml"]
    assert invoke("merge", recipe, tmp_path / "out", "--quiet", "--no-copy-tokenizer").exit_code == 0


def test_a_model_without_a_tokenizer_is_merged_with_a_warning(
    tmp_path: Path, invoke: Invoke, caplog: pytest.LogCaptureFixture
) -> None:
    result = invoke("merge", _recipe(tmp_path), tmp_path / "out", "--quiet")
    assert result.exit_code == 0, result.output
    assert f"{tmp_path / 'models' / 'base'} has no tokenizer" in caplog.text
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_the_configuration_names_the_dtype_of_the_weights(tmp_path: Path, invoke: Invoke) -> None:
    """transformers converts what it loads to that dtype."""
    recipe = _recipe(tmp_path)
    file = tmp_path / "models" / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "float16"}))
    result = invoke("merge", recipe, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "names float16 and the merged weights are float32, which the merged model's names" in result.output
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    assert invoke("verify", tmp_path / "out").exit_code == 0
    recipe.write_text(recipe.read_text() + "out_dtype: float16\n")
    result = invoke("merge", recipe, tmp_path / "half")
    assert "config.json names" not in result.output
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "float16"


@pytest.mark.parametrize("command", ["check", "merge"])
def test_a_chat_template_needs_a_tokenizer(command: str, tmp_path: Path, invoke: Invoke) -> None:
    recipe = _recipe(tmp_path)
    recipe.write_text(recipe.read_text() + "chat_template: chatml\n")
    result = invoke(command, recipe, *([tmp_path / "out"] if command == "merge" else []))
    assert result.exit_code == 1
    assert f"{tmp_path / 'models' / 'base'} has no tokenizer, with which chat_template is saved" in result.output
    assert "--no-copy-tokenizer" not in result.output
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_is_missing_repeated_unknown_or_different_is_found(tmp_path: Path) -> None:
    tensors = {name: torch.zeros(2, 3) for name in ("a", "b", "c")}
    planned = [described(name, tensor) for name, tensor in tensors.items()]
    one, new = tmp_path / "1.safetensors", itertools.count(2)

    def written(content: dict[str, torch.Tensor]) -> Path:
        # A file of its own: headers are known by size and time, and a clock may not tell two files of one size apart.
        file = tmp_path / f"{next(new)}.safetensors"
        save_file(content, file)
        return file

    save_file({"a": tensors["a"]}, one)
    for content, message in (
        ({"b": tensors["b"]}, "got missing c"),
        ({"a": tensors["a"], "b": tensors["b"], "c": tensors["c"]}, "one file only; got repeated a"),
        ({"b": tensors["b"], "c": tensors["c"], "d": tensors["a"]}, "planned tensors only; got unknown d"),
        ({"b": tensors["b"], "c": tensors["c"].half()}, "planned shape and dtype; got different c"),
    ):
        two = written(content)
        with pytest.raises(ValueError, match=message):
            require_each_once(planned, [one, two])
    require_each_once(planned, [one, written({"b": tensors["b"], "c": tensors["c"]})])
    require_each_once(planned, [one, written({"b": tensors["b"]})], absent=["c"])


def test_the_record_has_the_digest_of_every_other_file(tmp_path: Path, recipe: Path, invoke: Invoke) -> None:
    assert invoke("merge", recipe, tmp_path / "out", "--quiet").exit_code == 0
    record = json.loads((tmp_path / "out" / "mergekit-ace.json").read_text())
    assert set(record["files"]) | {"mergekit-ace.json"} == set(os.listdir(tmp_path / "out"))
