"""`mergekit-ace merge --adapter`: the recipe of a full merge gives an adapter that adds the same."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import yaml
from mergekit.common import ModelReference
from transformers import AutoModelForCausalLM

from tests.checkpoints import Suite, add_adapter, read_tensors
from tests.cli.conftest import Invoke
from tests.commands import mergekit_yaml

# The third adapts the output head, which peft then saves as well.
pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")

TARGETS = (["q_proj", "up_proj", "down_proj"], ["q_proj", "v_proj"], ["q_proj", "up_proj", "lm_head"])
# Updates of norm 1 that a full merge takes from the difference of weights in float32.
_TOLERANCE = 2e-5


@pytest.fixture
def adapters(suite: Suite, tmp_path: Path) -> list[Path]:
    return [
        add_adapter(suite.base.path, tmp_path / f"adapter{t}", rank=2 + t, targets=targets, seed=t)
        for t, targets in enumerate(TARGETS)
    ]


def recipe_of(suite: Suite, adapters: list[Path], **entries: object) -> str:
    models = [
        {"model": f"{suite.base.path}+{folder}", "parameters": {"weight": 1 + t}} for t, folder in enumerate(adapters)
    ]
    return yaml.safe_dump({"merge_method": "ace", "base_model": str(suite.base.path), "models": models, **entries})


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"preset": "published", "lambda": 0.5},
        {"lambda": [0.2, 1.0], "matrices": [{"filter": "up_proj", "value": "average"}, {"value": "ace"}]},
    ],
    ids=["default", "published", "gradients and filters"],
)
def test_the_adapter_adds_what_a_full_merge_adds(
    suite: Suite, adapters: list[Path], parameters: dict[str, object], tmp_path: Path, invoke: Invoke
) -> None:
    text = recipe_of(suite, adapters, parameters=parameters, dtype="float32")
    file = tmp_path / "recipe.yml"
    file.write_text(text)
    flags = ("--lora-merge-dtype", "float32", "--lora-merge-cache", str(tmp_path / "cache"))
    full = read_tensors(mergekit_yaml(text, tmp_path / "full", "--quiet", *flags))
    result = invoke("merge", file, tmp_path / "adapter", "--adapter")
    assert result.exit_code == 0, result.output
    assert "3 adapters in one of rank 9" in result.output
    model = AutoModelForCausalLM.from_pretrained(suite.base.path, dtype=torch.float32)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload().state_dict()
    for name, tensor in full.items():
        torch.testing.assert_close(merged[name] - base[name], tensor - base[name], atol=_TOLERANCE, rtol=1e-4)
    assert (tmp_path / "adapter" / "mergekit_config.yml").read_text() == text


@pytest.mark.parametrize(("preset", "asks"), [("0.1", False), ("default", True)])
def test_no_base_is_needed(
    preset: str,
    asks: bool,
    suite: Suite,
    adapters: list[Path],
    tmp_path: Path,
    invoke: Invoke,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """How large updates are for their base is all that is asked of it, and not by every preset."""
    file = tmp_path / "recipe.yml"
    file.write_text(recipe_of(suite, adapters, parameters={"preset": preset}))
    assert invoke("merge", file, tmp_path / "with", "--adapter", "--rank", "4").exit_code == 0
    file.write_text(file.read_text().replace(str(suite.base.path), "somebody/else-has-it"))
    for folder in adapters:
        config = json.loads((folder / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = "somebody/else-has-it"
        (folder / "adapter_config.json").write_text(json.dumps(config))
    result = invoke("merge", file, tmp_path / "without", "--adapter", "--rank", "4")
    assert result.exit_code == 0, result.output
    name = "adapter_model.safetensors"
    same = (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()
    assert same is not asks
    assert ("updates count as small" in caplog.text) is asks
    assert "rank 4, which hold" in result.output
    card = (tmp_path / "without" / "README.md").read_text()
    assert "base_model: somebody/else-has-it" in card
    assert "- adapter2" in card


def test_it_is_whole_or_not_there(suite: Suite, adapters: list[Path], tmp_path: Path, invoke: Invoke) -> None:
    file = tmp_path / "recipe.yml"
    file.write_text(recipe_of(suite, adapters))
    damaged = adapters[2] / "adapter_model.safetensors"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-50])
    result = invoke("merge", file, tmp_path / "out", "--adapter")
    assert result.exit_code == 1
    assert "must be a whole safetensors file" in result.stderr
    assert not (tmp_path / "out").exists()
    damaged.write_bytes(whole)
    assert invoke("merge", file, tmp_path / "out", "--adapter").exit_code == 0
    again = invoke("merge", file, tmp_path / "out", "--adapter")
    assert again.exit_code == 1
    assert "must be new or empty" in again.stderr
    assert invoke("merge", file, tmp_path / "out", "--adapter", "--overwrite", "--rank", "auto").exit_code == 0
    inside = invoke("merge", file, adapters[0], "--adapter", "--overwrite")
    assert inside.exit_code == 1
    assert "must not hold what the merge reads" in inside.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--rank", "3"), "--rank is that of an adapter"),
        (("--adapter", "--rank", "none"), "must be a whole number above 0, or auto; got none"),
        (("--adapter", "--part", "1/2"), "is not made in parts"),
        (("--adapter", "--workers", "2"), "drop --workers"),
        (("--adapter", "--resume"), "drop --resume"),
        (("--adapter", "--log-json", "-"), "drop --log-json"),
        (("--adapter", "--dry-run"), "is shown by mergekit-ace check --adapter"),
        (("--adapter", "--no-safe-serialization"), "an adapter is written as safetensors"),
    ],
)
def test_flags_that_do_not_go_together(
    suite: Suite, adapters: list[Path], flags: tuple[str, ...], words: str, tmp_path: Path, invoke: Invoke
) -> None:
    file = tmp_path / "recipe.yml"
    file.write_text(recipe_of(suite, adapters))
    result = invoke("merge", file, tmp_path / "out", *flags)
    assert result.exit_code == 2
    assert words in result.stderr
    assert not (tmp_path / "out").exists()


def with_settings(adapter: Path, **settings: object) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_settings_of_a_later_peft_are_named(
    suite: Suite, adapters: list[Path], tmp_path: Path, invoke: Invoke, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "recipe.yml"
    file.write_text(recipe_of(suite, adapters))
    with_settings(adapters[1], unsloth_fixed=True, later_option=None)
    assert "installed peft does not know" not in invoke("check", file, "--adapter").output
    with_settings(adapters[1], scale_by_depth=0.5)
    assert "installed peft does not know: scale_by_depth" in invoke("check", file, "--adapter").output.replace(
        "\n", " "
    )
    strict = invoke("merge", file, tmp_path / "out", "--adapter", "--strict")
    assert strict.exit_code == 1
    assert "installed peft does not know: scale_by_depth" in strict.stderr
    assert not (tmp_path / "out").exists()
    assert invoke("merge", file, tmp_path / "out", "--adapter").exit_code == 0
    assert "adapter1 has settings that the installed peft does not know: scale_by_depth" in caplog.text


def test_an_adapter_that_is_nowhere_is_named_with_where_it_was_looked_for(
    suite: Suite, adapters: list[Path], tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise ConnectionError("no route to the hub")

    file = tmp_path / "recipe.yml"
    file.write_text(recipe_of(suite, [adapters[0], tmp_path / "typo"]))
    result = invoke("merge", file, tmp_path / "out", "--adapter")
    assert f"there is no {tmp_path / 'typo'}" in result.stderr
    monkeypatch.setattr(ModelReference, "local_path", refused)
    file.write_text(recipe_of(suite, [adapters[0], Path("adapters/typo")]))
    result = invoke("merge", file, tmp_path / "out", "--adapter")
    assert result.exit_code == 1
    assert "there is no folder adapters/typo, and it cannot be fetched: no route to the hub" in result.stderr


def test_recipes_that_hold_more_than_adapters_are_refused(
    suite: Suite, adapters: list[Path], tmp_path: Path, invoke: Invoke
) -> None:
    base = str(suite.base.path)
    adapter = f"{base}+{adapters[0]}"
    copied = tmp_path / "another-base"
    shutil.copytree(suite.base.path, copied)
    for document, words in (
        ({"models": [{"model": adapter}, {"model": str(suite.experts[0].path)}]}, "is a whole model"),
        ({"models": [{"model": adapter}, {"model": str(adapters[1])}]}, f"Write {base}+{adapters[1]}"),
        (
            {"models": [{"model": adapter}, {"model": f"{copied}+{adapters[1]}"}]},
            "must be put on the recipe's base_model",
        ),
        ({"models": [{"model": adapter}], "tokenizer": {"source": "base"}}, "must have no tokenizer"),
        (
            {"slices": [{"sources": [{"model": model, "layer_range": [0, 1]} for model in (base, adapter)]}]},
            "must list models",
        ),
        ({"models": [{"model": adapter}], "merge_method": "ties"}, "must be one that gives an adapter"),
    ):
        file = tmp_path / "recipe.yml"
        file.write_text(yaml.safe_dump({"merge_method": "ace", "base_model": base, **document}))
        result = invoke("merge", file, tmp_path / "out", "--adapter")
        assert result.exit_code == 1
        assert words in result.stderr
        assert not (tmp_path / "out").exists()
