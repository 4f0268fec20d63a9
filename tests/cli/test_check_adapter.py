"""`mergekit-ace check --adapter`: from the adapters alone, with no base on the disk."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import yaml

from tests.checkpoints import Suite, add_adapter, edit_tensors, make_suite
from tests.cli.conftest import Invoke

BASE = "somebody/else-has-it"


@pytest.fixture
def adapters(suite: Suite, tmp_path: Path) -> list[Path]:
    folders = []
    for t, targets in enumerate((["q_proj", "up_proj"], ["q_proj", "v_proj"])):
        folders.append(add_adapter(suite.base.path, tmp_path / f"adapter{t}", rank=2 + t, targets=targets, seed=t))
        file = folders[-1] / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": BASE}))
    return folders


def recipe(folder: Path, adapters: list[Path], **entries: object) -> Path:
    models = [{"model": f"{BASE}+{adapter}"} for adapter in adapters]
    file = folder / "recipe.yml"
    file.write_text(yaml.safe_dump({"merge_method": "ace", "base_model": BASE, "models": models, **entries}))
    return file


def test_what_will_come_out_is_said_without_a_merge(adapters: list[Path], tmp_path: Path, invoke: Invoke) -> None:
    result = invoke("check", recipe(tmp_path, adapters), "--adapter")
    assert result.exit_code == 0, result.output
    assert "0 errors, 0 warnings" in result.output
    assert "adapter1: rank 3" in result.output
    # Three layers of q_proj, up_proj and v_proj.
    assert "9 weights, 3 of them adapted more than once" in result.output
    assert "one adapter of rank 5," in result.output


def test_a_rank_says_what_it_keeps_as_the_merge_does(adapters: list[Path], tmp_path: Path, invoke: Invoke) -> None:
    file = recipe(tmp_path, adapters)
    result = invoke("check", file, "--adapter", "--rank", "2")
    assert result.exit_code == 0, result.output
    assert invoke("merge", file, tmp_path / "out", "--adapter", "--rank", "2").exit_code == 0
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert f"it keeps {report['energy_kept']:.1%} of the merged updates' energy" in result.output
    assert 0.3 < report["energy_kept"] < 1


def test_what_is_wrong_is_found(adapters: list[Path], tmp_path: Path, invoke: Invoke) -> None:
    misspelt = invoke("check", recipe(tmp_path, adapters, parameters={"epsylon": 1}), "--adapter")
    assert misspelt.exit_code == 1
    assert "ace has no parameter 'epsylon'" in misspelt.output.replace("\n", " ")
    file = adapters[1] / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "another/base"}))
    strict = invoke("check", recipe(tmp_path, adapters), "--adapter", "--strict")
    assert strict.exit_code == 1
    assert "adapter1 was trained on another/base, but is put on somebody/else-has-it" in strict.output.replace(
        "\n", " "
    )
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dora": True}))
    refused = invoke("check", recipe(tmp_path, adapters), "--adapter")
    assert refused.exit_code == 1
    assert "DoRA" in refused.output
    alone = invoke("check", recipe(tmp_path, adapters), "--rank", "2")
    assert alone.exit_code == 2
    assert "add --adapter" in alone.stderr


@pytest.mark.parametrize("command", ["check", "merge"])
def test_an_adapter_that_does_nothing(command: str, adapters: list[Path], tmp_path: Path, invoke: Invoke) -> None:
    with edit_tensors(adapters[1] / "adapter_model.safetensors") as tensors:
        for name in list(tensors):
            if "lora_B" in name:
                tensors[name] = tensors[name] * 0
    out = [tmp_path / "out"] if command == "merge" else []
    result = invoke(command, recipe(tmp_path, adapters), *out, "--adapter")
    assert result.exit_code == 1
    assert "the adapter adapter1 does nothing: all of its 6 updates are 0" in result.output.replace("\n", " ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["check", "merge", "inspect"])
def test_modules_under_a_longer_name(command: str, adapters: list[Path], tmp_path: Path, invoke: Invoke) -> None:
    with edit_tensors(adapters[0] / "adapter_model.safetensors") as tensors:
        for name in list(tensors):
            tensors[name.replace("base_model.model.", "base_model.model.module.")] = tensors.pop(name)
    adapters = [adapters[0], adapters[0].parent / "same"]
    shutil.copytree(adapters[0], adapters[1])
    with edit_tensors(adapters[1] / "adapter_model.safetensors") as tensors:
        for name in list(tensors):
            tensors[name.replace("model.module.", "model.")] = tensors.pop(name)
    out = [tmp_path / "out"] if command == "merge" else []
    result = invoke(command, recipe(tmp_path, adapters), *out, "--adapter")
    assert result.exit_code == 1
    assert "adapter0 has module.model.layers.0" in result.output.replace("\n", " ")
    assert "where same has model.layers.0" in result.output.replace("\n", " ")


@pytest.mark.parametrize("command", ["check", "merge", "inspect"])
def test_weights_that_are_all_0_are_an_error_of_every_command(
    command: str, adapters: list[Path], tmp_path: Path, invoke: Invoke
) -> None:
    models = [{"model": f"{BASE}+{adapter}", "parameters": {"weight": 0}} for adapter in adapters]
    file = recipe(tmp_path, adapters, models=models)
    result = invoke(command, file, *([tmp_path / "out"] if command == "merge" else []), "--adapter")
    assert result.exit_code == 1
    assert "parameter weight must be positive for at least one adapter; got 0" in result.output.replace("\n", " ")


def of(base: Path, folder: Path, *experts: Path) -> Path:
    file = folder / "of-base.yml"
    models = [{"model": f"{base}+{expert}"} for expert in experts]
    file.write_text(yaml.safe_dump({"merge_method": "ace", "base_model": str(base), "models": models}))
    return file


def test_a_base_on_the_disk_says_what_would_not_load(
    suite: Suite, adapters: list[Path], tmp_path: Path, invoke: Invoke
) -> None:
    other = make_suite("gpt2", tmp_path, experts=1).base.path
    found = invoke("check", of(other, tmp_path, *adapters), "--adapter")
    assert found.exit_code == 0, found.output
    assert "does nothing: no module of" in found.output.replace("\n", " ")
    resized = tmp_path / "resized"
    shutil.copytree(adapters[0], resized)
    with edit_tensors(resized / "adapter_model.safetensors") as tensors:
        tensors["base_model.model.model.embed_tokens.weight"] = torch.ones(100, 32)
    found = invoke("check", of(suite.base.path, tmp_path, resized, adapters[1]), "--adapter")
    assert "was trained after its base's vocabulary was resized" in found.output.replace("\n", " ")
    assert "model.resize_token_embeddings(100)" in found.output


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"][0, 0] = torch.nan


def _table(tensors: dict[str, torch.Tensor], rows: int) -> None:
    tensors["base_model.model.lm_head.weight"] = torch.ones(rows, 32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ((_nan, lambda _: None), "adapter adapter0 holds NaN or infinity"),
        (
            (lambda t: _table(t, 96), lambda t: _table(t, 100)),
            "lm_head.weight must have one shape in all adapters; got (96, 32), and (100, 32) in adapter1",
        ),
    ],
    ids=["NaN", "shapes"],
)
def test_check_finds_what_would_stop_the_merge(
    change: Sequence[Callable[[dict[str, torch.Tensor]], None]],
    words: str,
    adapters: list[Path],
    tmp_path: Path,
    invoke: Invoke,
) -> None:
    for edit, adapter in zip(change, adapters, strict=True):
        with edit_tensors(adapter / "adapter_model.safetensors") as tensors:
            edit(tensors)
    for command in ("check", "merge"):
        out = [tmp_path / "out"] if command == "merge" else []
        result = invoke(command, recipe(tmp_path, adapters), *out, "--adapter")
        assert result.exit_code == 1, command
        assert words in result.output.replace("\n", " "), command
    assert not (tmp_path / "out").exists()


def test_a_pointer_in_place_of_an_adapter_is_named(adapters: list[Path], tmp_path: Path, invoke: Invoke) -> None:
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 123\n"
    (adapters[0] / "adapter_model.safetensors").write_text(text)
    result = invoke("check", recipe(tmp_path, adapters), "--adapter")
    assert result.exit_code == 1
    assert "it is a Git LFS pointer" in result.output.replace("\n", " ")
