"""Files that are damaged, or pointers to what was not fetched: every command names the file and its model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mergekit_ace.checkpoints.hub import HubModel
from mergekit_ace.checks import files
from mergekit_ace.checks.prefixes import renamed_remedy
from mergekit_ace.cli import main
from tests.checkpoints import Suite, Update, add_adapter, edit_tensors, make_suite, read_tensors
from tests.checkpoints.storage import Storage
from tests.report.recipes import document, write

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4976698672\n"


@pytest.fixture(scope="module")
def suites(tmp_path_factory: pytest.TempPathFactory) -> dict[Storage, Suite]:
    storages: tuple[Storage, ...] = ("safetensors", "sharded", "pickle")
    return {
        storage: make_suite(
            "llama",
            tmp_path_factory.mktemp(storage.replace(" ", "")),
            experts=2,
            storage=storage,
            update=Update.EVEN,
            scale=0.05,
        )
        for storage in storages
    }


def halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def point(file: Path) -> None:
    file.write_text(POINTER)


def promise(file: Path) -> None:
    """Have an index promise a tensor that its shard lacks."""
    index = json.loads(file.read_text())
    index["weight_map"]["model.norm.bias"] = next(iter(index["weight_map"].values()))
    file.write_text(json.dumps(index))


def unlist(file: Path) -> None:
    """Have an index name no file for a tensor."""
    index = json.loads(file.read_text())
    index["weight_map"]["model.norm.weight"] = None
    file.write_text(json.dumps(index))


# What is wrong: storage, file (the first that matches), how it is spoiled, words of the error.
DAMAGE: dict[str, tuple[Storage, str, Callable[[Path], Any], str]] = {
    "pointer": ("safetensors", "model.safetensors", point, "is a Git LFS pointer: a text of"),
    "pointer to a shard": ("sharded", "*00002-of*.safetensors", point, "of 4,976,698,672 bytes"),
    "pointer to an index": ("sharded", "*.index.json", point, "git lfs pull"),
    "pointer to a pickle": ("pickle", "pytorch_model.bin", point, "git lfs pull"),
    "pointer to a configuration": ("safetensors", "config.json", point, "git lfs pull"),
    "pointer to a tokenizer": ("safetensors", "tokenizer.json", point, "git lfs pull"),
    "cut": ("safetensors", "model.safetensors", halve, "must be a whole safetensors file"),
    "cut shard": ("sharded", "*00002-of*.safetensors", halve, "must be a whole safetensors file"),
    "cut pickle": ("pickle", "pytorch_model.bin", halve, "must be a whole"),
    "cut configuration": ("safetensors", "config.json", halve, "must be JSON"),
    "empty": ("safetensors", "model.safetensors", lambda file: file.write_bytes(b""), "must be a whole safetensors"),
    "no shard": ("sharded", "*00002-of*.safetensors", Path.unlink, "No such file"),
    "no index": ("sharded", "*.index.json", Path.unlink, "it holds model-00001-of"),
    "an index without a map": ("sharded", "*.index.json", lambda file: file.write_text("{}"), "JSON with a weight_map"),
    "an index that lists nothing": (
        "sharded",
        "*.index.json",
        lambda file: file.write_text('{"weight_map": {}}'),
        "lists nothing",
    ),
    "an index without a file": ("sharded", "*.index.json", unlist, "has None for the file of model.norm.weight"),
    "an index that promises too much": ("sharded", "*.index.json", promise, "lacks model.norm.bias"),
}


def run(*arguments: object) -> str:
    result = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    return result.output


@pytest.mark.parametrize(
    ("command", "damage"), [*(("merge", damage) for damage in DAMAGE), ("check", "cut shard"), ("inspect", "pointer")]
)
def test_a_damaged_file_is_named_with_its_expert(
    damage: str, command: str, suites: dict[Storage, Suite], tmp_path: Path
) -> None:
    storage, pattern, spoil, words = DAMAGE[damage]
    suite = suites[storage]
    expert = Path(shutil.copytree(suite.experts[0].path, tmp_path / "expert"))
    (expert / "tokenizer.json").touch()
    (file,) = list(expert.glob(pattern))[:1]
    spoil(file)
    recipe = write(document(suite, models=[{"model": str(expert)}]), tmp_path / "recipe.yml")
    output = run(command, recipe, *([tmp_path / "out"] if command == "merge" else []))
    assert str(expert) in output
    assert words in output
    if damage not in ("no index", "an index that promises too much"):  # the folder and the shard are named
        assert str(file) in output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "spoil", "words"),
    [
        ("adapter_model.safetensors", point, "git lfs pull"),
        ("adapter_model.safetensors", halve, "must be a whole safetensors file"),
        ("adapter_model.safetensors", Path.unlink, "must hold adapter_model.safetensors or adapter_model.bin"),
        ("adapter_config.json", point, "git lfs pull"),
        ("adapter_config.json", Path.unlink, "must hold adapter_config.json"),
    ],
)
def test_a_damaged_adapter_is_named(
    name: str, spoil: Callable[[Path], Any], words: str, suites: dict[Storage, Suite], tmp_path: Path
) -> None:
    suite = suites["safetensors"]
    adapter = add_adapter(suite.base.path, tmp_path / "adapter", rank=2, targets=["q_proj"])
    spoil(adapter / name)
    recipe = write(document(suite, models=[{"model": f"{suite.base.path}+{adapter}"}]), tmp_path / "recipe.yml")
    output = run("merge", recipe, tmp_path / "out", "--lora-merge-cache", tmp_path / "cache")
    assert str(adapter) in output
    assert words in output
    assert not (tmp_path / "cache").exists()


def test_every_damaged_expert_is_named_in_one_run(suites: dict[Storage, Suite], tmp_path: Path) -> None:
    suite = suites["safetensors"]
    experts = [Path(shutil.copytree(expert.path, tmp_path / expert.path.name)) for expert in suite.experts]
    halve(experts[0] / "model.safetensors")
    point(experts[1] / "model.safetensors")
    models = [{"model": str(expert)} for expert in experts]
    output = run("merge", write(document(suite, models=models), tmp_path / "recipe.yml"), tmp_path / "out")
    assert all(str(expert / "model.safetensors") in output for expert in experts)


@pytest.mark.parametrize("command", ["check", "merge"])
def test_a_single_file_beside_an_index_of_others(command: str, suites: dict[Storage, Suite], tmp_path: Path) -> None:
    """mergekit reads the index, transformers the single file."""
    suite = suites["sharded"]
    expert = Path(shutil.copytree(suite.experts[0].path, tmp_path / "expert"))
    recipe = write(document(suite, models=[{"model": str(expert)}]), tmp_path / "recipe.yml")
    words = f"{expert} holds model.safetensors and an index of"
    out = [tmp_path / "out"] if command == "merge" else []
    sound = CliRunner().invoke(main, [command, str(recipe), *map(str, out)])
    assert sound.exit_code == 0, sound.output
    assert words not in sound.output
    shutil.copy(suites["safetensors"].base.path / "model.safetensors", expert)
    result = CliRunner().invoke(main, [command, str(recipe), *map(str, out), *(["--overwrite"] if out else [])])
    assert words in result.output
    assert "transformers loads model.safetensors" in result.output
    assert result.exit_code == 0, result.output


def test_what_an_index_does_not_list_does_not_count(suites: dict[Storage, Suite], tmp_path: Path) -> None:
    """mergekit reads what the index lists; a tensor that only a shard knows is not there for it."""
    suite = suites["sharded"]
    expert = Path(shutil.copytree(suite.experts[0].path, tmp_path / "expert"))
    file = expert / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    name = "model.layers.0.mlp.up_proj.weight"
    assert name in read_tensors(expert)
    del index["weight_map"][name]
    file.write_text(json.dumps(index))
    output = run("check", write(document(suite, models=[{"model": str(expert)}]), tmp_path / "recipe.yml"))
    assert f"{expert} lacks {name}: model-0000" in output
    assert "holds them, and the index does not list them" in output
    assert "The index belongs to other files: download or copy it again" in output
    assert "Complete the checkpoint" not in output


@pytest.mark.parametrize("command", ["check", "merge", "inspect"])
def test_names_that_a_wrapper_made_longer_are_told_from_tensors_that_are_not_there(
    command: str, suites: dict[Storage, Suite], tmp_path: Path
) -> None:
    suite = suites["safetensors"]
    experts = [Path(shutil.copytree(expert.path, tmp_path / expert.path.name)) for expert in suite.experts]
    with edit_tensors(experts[0] / "model.safetensors") as tensors:
        for name in list(tensors):
            tensors[f"_orig_mod.{name}"] = tensors.pop(name)
    with edit_tensors(experts[1] / "model.safetensors") as tensors:
        del tensors["model.norm.weight"]
    models = [{"model": str(expert)} for expert in experts]
    recipe = write(document(suite, models=models), tmp_path / "recipe.yml")
    output = run(command, recipe, *([tmp_path / "out"] if command == "merge" else []))
    assert "its names hold '_orig_mod.', which torch.compile puts there" in output
    assert "name.replace('_orig_mod.', '')" in output
    if command != "inspect":  # which shows what the merge does with the tensors that are there
        assert f"{experts[1]} lacks model.norm.weight" in output
        assert output.count("Complete the checkpoint") == 1


@pytest.mark.parametrize("command", ["check", "merge"])
@pytest.mark.parametrize(
    ("found", "why", "remedy"),
    [
        ("", "it holds them without 'model.'", "Put 'model.' before each"),
        (
            "model.language_model.",
            "it holds them under 'model.language_model.' in place of 'model.'",
            "'model.' + name.removeprefix('model.language_model.')",
        ),
    ],
)
def test_names_that_begin_otherwise(
    found: str, why: str, remedy: str, command: str, suites: dict[Storage, Suite], tmp_path: Path
) -> None:
    suite = suites["safetensors"]
    expert = Path(shutil.copytree(suite.experts[0].path, tmp_path / "expert"))
    with edit_tensors(expert / "model.safetensors") as tensors:
        for name in [name for name in tensors if name.startswith("model.")]:
            tensors[found + name.removeprefix("model.")] = tensors.pop(name)
    recipe = write(document(suite, models=[{"model": str(expert)}]), tmp_path / "recipe.yml")
    output = run(command, recipe, *([tmp_path / "out"] if command == "merge" else []))
    assert why in output
    assert remedy in output
    assert "Complete the checkpoint" not in output
    assert "that no output tensor is made of" not in output


def test_a_layer_that_is_not_there_is_none_that_was_renamed() -> None:
    held = [f"model.layers.{layer}.{part}.weight" for layer in (0, 2) for part in ("up", "down")]
    assert renamed_remedy(["model.layers.1.up.weight", "model.layers.1.down.weight"], held) is None
    assert renamed_remedy(["model.layers.1.up.weight"], held) is None
    held = ["encoder.embed.weight", "encoder.norm.weight", "decoder.norm.weight"]
    assert renamed_remedy(["decoder.embed.weight"], held) is None
    assert renamed_remedy(["lm_head.weight"], held) is None


def test_a_link_to_weights_that_are_not_there(suites: dict[Storage, Suite], tmp_path: Path) -> None:
    """As a cache of the hub leaves it whose files were moved."""
    suite = suites["safetensors"]
    expert = Path(shutil.copytree(suite.experts[0].path, tmp_path / "expert"))
    (expert / "model.safetensors").unlink()
    (expert / "model.safetensors").symlink_to("../blobs/0123")
    output = run("check", write(document(suite, models=[{"model": str(expert)}]), tmp_path / "recipe.yml"))
    assert f"{expert / 'model.safetensors'} is a link to ../blobs/0123, which is not there" in output


@pytest.mark.parametrize("command", ["check", "merge"])
def test_folders_that_lie_elsewhere(
    command: str, suites: dict[Storage, Suite], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative to the recipe and not to where the command runs, and below a ~ that no shell has read."""
    suite, here = suites["safetensors"], tmp_path / "here"
    for name, model in (("base", suite.base), ("models/a", suite.experts[0]), ("b", suite.experts[1])):
        shutil.copytree(model.path, tmp_path / name)
    models = [{"model": "models/a"}, {"model": "~/b"}]
    recipe = write(document(suite, base_model="./base", models=models), tmp_path / "recipe.yml")
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(tmp_path))
    told = HubModel(state="unreachable", words="no network", headers={}, files={})
    monkeypatch.setattr(files, "hub_model", lambda source: told)
    output = run(command, recipe, *([here / "out"] if command == "merge" else []))
    for name in ("base", "models/a"):
        assert f"mergekit starts from the folder in which it runs; write {tmp_path / name}." in output
    assert f"mergekit does not read ~ as the home; write {tmp_path / 'b'}." in output
    assert not list(here.iterdir())
