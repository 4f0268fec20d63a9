"""A merge in parts, joined: the same tensors as in one run, or an error and nothing written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from tests.checkpoints import make_suite, read_tensors
from tests.cli.conftest import Invoke
from tests.cli.test_merge import files

Alter = Callable[[Path], None]


def merge_parts(invoke: Invoke, recipe: Path, folder: Path, *choices: tuple[str, ...]) -> list[Path]:
    parts = [folder / f"part{index}" for index in range(len(choices))]
    for part, choice in zip(parts, choices, strict=True):
        result = invoke("merge", recipe, part, "--quiet", "--out-shard-size", "15K", *choice)
        assert result.exit_code == 0, result.output
    return parts


def fractions(count: int) -> list[tuple[str, ...]]:
    return [("--part", f"{index}/{count}") for index in range(1, count + 1)]


def assert_same_tensors(folder: Path, other: Path) -> None:
    tensors, others = read_tensors(folder), read_tensors(other)
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == others[name].dtype
        assert torch.equal(tensor.view(torch.uint8), others[name].view(torch.uint8)), name


@pytest.mark.parametrize("count", [1, 3, 40])
def test_parts_by_size_join_to_the_unsplit_merge(count: int, recipe: Path, tmp_path: Path, invoke: Invoke) -> None:
    parts = merge_parts(invoke, recipe, tmp_path, *fractions(count))
    assert invoke("merge", recipe, tmp_path / "whole" / "model", "--quiet", "--out-shard-size", "15K").exit_code == 0
    result = invoke("join", tmp_path / "joined" / "model", *reversed(parts))
    assert result.exit_code == 0, result.output
    assert_same_tensors(tmp_path / "joined" / "model", tmp_path / "whole" / "model")
    joined, whole = files(tmp_path / "joined" / "model"), files(tmp_path / "whole" / "model")
    assert {"README.md", "config.json", "tokenizer.json", "mergekit_config.yml"} <= joined.keys()
    assert joined == whole
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "joined" / "model")


@pytest.mark.parametrize("family", ["mixtral", "llama-tied"])
def test_parts_by_name_join_too(family: str, tmp_path: Path, invoke: Invoke) -> None:
    suite = make_suite(family, tmp_path / "models", experts=2, dtype=torch.bfloat16)
    recipe = tmp_path / "recipe.yml"
    models = [{"model": str(expert.path)} for expert in suite.experts]
    recipe.write_text(yaml.safe_dump({"merge_method": "ace", "base_model": str(suite.base.path), "models": models}))
    layers = [("--no-copy-tokenizer", "--only-tensors", f"model.layers.{index}.*") for index in range(3)]
    ends = ("--no-copy-tokenizer", "--only-tensors", "model.embed*", "--only-tensors", "model.norm*")
    if "lm_head.weight" in read_tensors(suite.base.path):
        ends = (*ends, "--only-tensors", "lm_head*")
    parts = merge_parts(invoke, recipe, tmp_path, *layers, ends)
    assert invoke("merge", recipe, tmp_path / "whole", "--quiet", "--no-copy-tokenizer").exit_code == 0
    assert invoke("join", tmp_path / "joined", *parts, "--out-shard-size", "1M").exit_code == 0
    assert (tmp_path / "joined" / "model.safetensors").exists()
    assert_same_tensors(tmp_path / "joined", tmp_path / "whole")


def test_a_part_does_not_look_like_a_model(recipe: Path, tmp_path: Path, invoke: Invoke) -> None:
    (part,) = merge_parts(invoke, recipe, tmp_path, ("--part", "1/2"))
    assert sorted(path.name for path in part.iterdir()) == ["files", "part.json", "tensors"]
    for folder in (part, part / "files", part / "tensors"):
        with pytest.raises((OSError, ValueError)):
            transformers.AutoModelForCausalLM.from_pretrained(folder)


def damage(part: Path) -> None:
    file = sorted((part / "tensors").glob("*.safetensors"))[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def truncate(part: Path) -> None:
    file = sorted((part / "tensors").glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-1])


def remove(part: Path) -> None:
    sorted((part / "tensors").glob("*.safetensors"))[0].unlink()


def alter_manifest(path: str, value: object) -> Alter:
    def alter(part: Path) -> None:
        manifest = json.loads((part / "part.json").read_text())
        *outer, last = path.split(".")
        place = manifest
        for key in outer:
            place = place[key]
        place[last] = value
        (part / "part.json").write_text(json.dumps(manifest))

    return alter


def alter_receipt(part: Path) -> None:
    manifest = json.loads((part / "part.json").read_text())
    manifest["receipts"][0]["sha256"] = "0" * 64
    (part / "part.json").write_text(json.dumps(manifest))


@pytest.fixture
def halves(recipe: Path, tmp_path: Path, invoke: Invoke) -> list[Path]:
    return merge_parts(invoke, recipe, tmp_path, *fractions(2))


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (damage, "which is damaged or missing"),
        (truncate, "which is damaged or missing"),
        (remove, "which is damaged or missing"),
        (lambda part: (part / "part.json").unlink(), "part must be a folder written by a merge with --part"),
        (lambda part: (part / "part.json").write_text("{"), "part must have a readable part.json"),
        (alter_manifest("format", 1), "part must have a readable part.json"),
        (alter_manifest("plan.merge.mergekit", "0.1.4"), "got different mergekit"),
        (alter_manifest("plan.merge.mergekit_ace", "0.0.1"), "got different mergekit_ace"),
        (alter_manifest("plan.merge.recipe", "0" * 64), "got different recipe"),
        (alter_manifest("plan.merge.tokenizer", "0" * 64), "got different tokenizer"),
        (alter_manifest("plan.merge.plan", []), "got different plan"),
        (alter_manifest("plan.inputs", {}), "parts must be made from the same inputs; got different"),
        (alter_manifest("files", {}), "parts must have the same files; got different README.md"),
        (alter_manifest("receipts", []), "every tensor must be in a part; got missing"),
        (alter_receipt, "whose receipts were edited"),
        (lambda part: (part / "files" / "config.json").write_text("{}"), "config.json, which is damaged or missing"),
        (lambda part: (part / "files" / "config.json").unlink(), "config.json, which is damaged or missing"),
        (lambda part: (part / "files" / "more.json").write_text("{}"), "part must hold its own files only"),
        (lambda part: (part / "tensors" / "more.safetensors").touch(), "part must hold its own files only"),
    ],
)
def test_a_part_that_is_not_as_written_is_refused(
    alter: Alter, message: str, halves: list[Path], tmp_path: Path, invoke: Invoke
) -> None:
    alter(halves[1])
    result = invoke("join", tmp_path / "joined", *halves)
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not list(tmp_path.glob("joined*"))


def test_every_tensor_is_there_exactly_once(halves: list[Path], tmp_path: Path, invoke: Invoke) -> None:
    shutil.copytree(halves[1], tmp_path / "again")
    for parts, message in (
        (halves[:1], "every tensor must be in a part; got missing"),
        ([*halves, tmp_path / "again"], "every tensor must be in one part only; got repeated"),
    ):
        result = invoke("join", tmp_path / "joined", *parts)
        assert result.exit_code == 1
        assert message in result.stderr
    assert not list(tmp_path.glob("joined*"))


def test_parts_of_another_recipe_or_with_other_options_are_refused(
    halves: list[Path], recipe: Path, tmp_path: Path, invoke: Invoke
) -> None:
    other = tmp_path / "other.yml"
    other.write_text(recipe.read_text() + "parameters: {lambda: 0.5}\n")
    for arguments in ((other,), (recipe, "--lora-merge-dtype", "float32")):
        file, *options = arguments
        assert (
            invoke("merge", file, tmp_path / "part", "--quiet", "--overwrite", "--part", "2/2", *options).exit_code == 0
        )
        result = invoke("join", tmp_path / "joined", halves[0], tmp_path / "part", "--out-shard-size", "1M")
        assert result.exit_code == 1
        assert "parts must come from the same merge; got different recipe" in result.stderr


def test_a_part_may_be_replaced_and_an_output_too(
    halves: list[Path], recipe: Path, tmp_path: Path, invoke: Invoke
) -> None:
    again = invoke("merge", recipe, halves[1], "--quiet", "--out-shard-size", "15K", "--part", "2/2", "--overwrite")
    assert again.exit_code == 0, again.output
    for flags, status in (((), 0), ((), 1), (("--overwrite",), 0)):
        assert invoke("join", tmp_path / "joined", *halves, *flags).exit_code == status


def test_no_parts_is_a_usage_error(tmp_path: Path, invoke: Invoke) -> None:
    assert invoke("join", tmp_path / "joined").exit_code == 2
