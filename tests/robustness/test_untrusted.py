"""Untrusted checkpoints: no code in them is run, and their names send no control sequences to a terminal."""

import json
import logging
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit.merge_methods import merge_tensors

from mergekit_ace.cli import main
from tests.checkpoints import Suite, make_suite, read_tensors
from tests.commands import mergekit_pytorch, mergekit_yaml
from tests.end_to_end.comparison import recipe_for

Merge = Callable[[Suite, Path], object]


class Code:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def write_zip(tensors: dict[str, Any], file: Path) -> None:
    torch.save(tensors, file)


def write_legacy(tensors: dict[str, Any], file: Path) -> None:
    torch.save(tensors, file, _use_new_zipfile_serialization=False)


def write_plain(tensors: dict[str, Any], file: Path) -> None:
    """No format of torch's, only its name."""
    file.write_bytes(pickle.dumps({"code": tensors["code"]}, protocol=2))


def by_yaml(*flags: str) -> Merge:
    return lambda suite, out: mergekit_yaml(recipe_for(suite), out, *flags)


def by_pytorch(suite: Suite, out: Path) -> object:
    recipe = recipe_for(suite)
    experts = [{"model": str(expert.path / "pytorch_model.bin")} for expert in suite.experts]
    base = str(suite.base.path / "pytorch_model.bin")
    return mergekit_pytorch({**recipe, "base_model": base, "models": experts}, out)


def run(arguments: list[str]) -> None:
    result = CliRunner().invoke(main, arguments)
    if result.exit_code:
        raise RuntimeError(result.output)


def by_us(*command: str) -> Merge:
    def merge(suite: Suite, out: Path) -> None:
        recipe = out.with_suffix(".yml")
        recipe.write_text(yaml.safe_dump(recipe_for(suite)))
        run([part.format(recipe=recipe, out=out) for part in command])

    return merge


# Ours say it in words of their own; mergekit passes on torch's.
REFUSED = {
    "mergekit-yaml": "Weights only load failed",
    "mergekit-yaml --lazy-unpickle": "Weights only load failed",
    "mergekit-pytorch": "Weights only load failed|Unsupported type",
    "merge": "nothing in it was run",
    "check": "nothing in it was run",
    "inspect": "nothing in it was run",
    "inspect --lazy-unpickle": "nothing in it was run",
}
COMMANDS = {
    "mergekit-yaml": by_yaml(),
    "mergekit-yaml --lazy-unpickle": by_yaml("--lazy-unpickle"),
    "mergekit-pytorch": by_pytorch,
    "merge": by_us("merge", "{recipe}", "{out}", "--no-copy-tokenizer"),
    "check": by_us("check", "{recipe}"),
    "inspect": by_us("inspect", "{recipe}"),
    "inspect --lazy-unpickle": by_us("inspect", "{recipe}", "--lazy-unpickle"),
}
WRITERS = {"zip": write_zip, "legacy": write_legacy, "plain pickle": write_plain}


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("where", ["base", "expert"])
@pytest.mark.parametrize("command", COMMANDS)
def test_no_code_in_a_pickle_is_run(command: str, where: str, form: str, tmp_path: Path) -> None:
    suite = make_suite("llama", tmp_path, experts=1, storage="pickle")
    untrusted = suite.base if where == "base" else suite.experts[0]
    made = tmp_path / "made-by-the-checkpoint"
    tensors = dict(read_tensors(untrusted.path))
    WRITERS[form]({**tensors, "code": Code(made)}, untrusted.path / "pytorch_model.bin")
    with pytest.raises((UnpicklingError, RuntimeError), match=REFUSED[command]):
        COMMANDS[command](suite, tmp_path / "out")
    assert not made.exists()
    assert not list(tmp_path.glob("out/*.safetensors"))


def test_check_names_the_shard_that_holds_code(tmp_path: Path) -> None:
    suite = make_suite("llama", tmp_path, experts=1, storage="sharded pickle")
    made = tmp_path / "made-by-the-checkpoint"
    shard = suite.experts[0].path / "pytorch_model-00002-of-00002.bin"
    write_zip({**torch.load(shard, weights_only=True), "code": Code(made)}, shard)
    with pytest.raises(RuntimeError, match=re.escape(f"{shard} must be") + ".*nothing in it was run"):
        COMMANDS["check"](suite, tmp_path / "out")
    assert not made.exists()


def test_it_would_be_run_where_it_is_trusted(tmp_path: Path) -> None:
    write_zip({"code": Code(tmp_path / "made")}, tmp_path / "file.bin")
    torch.load(tmp_path / "file.bin", weights_only=False)
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize("command", ["mergekit-yaml", "merge", "check", "inspect"])
def test_no_code_beside_the_weights_is_run(command: str, tmp_path: Path) -> None:
    """A configuration may name classes in Python files of its folder."""
    suite = make_suite("llama", tmp_path, experts=1)
    made = tmp_path / "made-by-the-checkpoint"
    for checkpoint in (suite.base, *suite.experts):
        file = checkpoint.path / "config.json"
        classes = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
        file.write_text(json.dumps({**json.loads(file.read_text()), "auto_map": classes}))
        (checkpoint.path / "code.py").write_text(f"import os; os.mkdir({str(made)!r})")
    COMMANDS[command](suite, tmp_path / "out")
    assert not made.exists()


@pytest.mark.parametrize("command", ["check", "inspect", "merge", "mergekit-yaml"])
def test_no_code_in_a_recipe_is_run(command: str, tmp_path: Path) -> None:
    made, out = tmp_path / "made-by-the-recipe", tmp_path / "out"
    text = f"merge_method: ace\nmodels: !!python/object/apply:os.mkdir ['{made}']\n"
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(text)
    with pytest.raises((RuntimeError, yaml.YAMLError), match="could not determine a constructor"):
        if command == "mergekit-yaml":
            mergekit_yaml(text, out)
        else:
            run([command, str(recipe), *([str(out)] if command == "merge" else [])])
    assert not made.exists()


def test_a_name_cannot_steer_the_terminal_by_log_or_error(caplog: pytest.LogCaptureFixture) -> None:
    name = "model.layers.0.\x1b[2J.weight"
    base = torch.eye(4)
    experts = [base + 0.01 * torch.arange(16.0).reshape(4, 4), base - 0.01]
    with caplog.at_level(logging.INFO, logger="mergekit_ace"):
        merge_tensors([base, *experts], "ace", base_index=0, name=name)
    with pytest.raises(ValueError, match=re.escape(r"layers.0.\x1b[2J.weight")) as raised:
        merge_tensors([base, *experts, base / 0], "ace", base_index=0, name=name)
    assert r"\x1b[2J.weight" in caplog.text
    assert "\x1b" not in caplog.text + str(raised.value)
