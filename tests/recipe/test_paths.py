"""Folders whose names mergekit takes apart: `@` for a revision, `+` for an adapter."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from torch import equal

from mergekit_ace.cli import main
from tests.checkpoints import Suite, Update, make_suite, read_tensors
from tests.report.recipes import document, write

NAMES = ["a@v2", "a+v2", "a+v+2", "a@v@2", "x@home/a", "x+y/a"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    return make_suite("llama", tmp_path_factory.mktemp("llama"), experts=2, update=Update.EVEN, scale=0.05)


def run(command: str, recipe: dict[str, Any], folder: Path, *flags: str) -> Result:
    file = write(recipe, folder / "recipe.yml")
    out = [str(folder / "out"), "--no-copy-tokenizer"] if command == "merge" else []
    return CliRunner().invoke(main, [command, str(file), *out, *flags])


@pytest.mark.parametrize(
    ("command", "name"),
    [*(("check", name) for name in NAMES), ("merge", "a@v2"), ("merge", "a+v+2"), ("inspect", "a@v2")],
)
def test_a_folder_with_a_sign_in_its_name_is_not_read_as_another(
    name: str, command: str, llama: Suite, tmp_path: Path
) -> None:
    shutil.copytree(llama.experts[0].path, tmp_path / "a")
    expert = tmp_path / name
    shutil.copytree(llama.experts[1].path, expert)
    result = run(command, document(llama, models=[{"model": str(expert)}]), tmp_path)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert f"mergekit does not read {expert}, which is on this disk" in result.output
    assert f"{{model: {{path: {expert}}}}}" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["a@v2", "a+v2", "a+v+2", "a@v@2"])
def test_the_remedy_reads_that_folder(name: str, llama: Suite, tmp_path: Path) -> None:
    expert = Path(shutil.copytree(llama.experts[1].path, tmp_path / name))
    parameters = {"weight": 1.0}
    assert run("check", document(llama, models=[{"model": {"model": {"path": str(expert)}}}]), tmp_path).exit_code == 0
    result = run(
        "merge",
        document(llama, models=[{"model": {"model": {"path": str(expert)}}, "parameters": parameters}]),
        tmp_path,
    )
    assert result.exit_code == 0, result.output
    merged, only = read_tensors(tmp_path / "out"), read_tensors(expert)
    assert all(equal(merged[name], tensor) for name, tensor in only.items() if name.endswith("_proj.weight"))


def test_the_base_and_slices_too(llama: Suite, tmp_path: Path) -> None:
    base = Path(shutil.copytree(llama.base.path, tmp_path / "base@v2"))
    sources = [{"model": str(model), "layer_range": [0, 3]} for model in (base, llama.experts[0].path)]
    recipe = {"merge_method": "ace", "base_model": str(base), "slices": [{"sources": sources}]}
    result = run("check", recipe, tmp_path)
    assert f"base_model: mergekit does not read {base}" in result.output


def test_an_adapter_with_a_sign(llama: Suite, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter@v2"
    adapter.mkdir()
    result = run("check", document(llama, models=[{"model": f"{llama.base.path}+{adapter}"}]), tmp_path)
    assert f"mergekit does not read {adapter}, which is on this disk" in result.output


def test_a_revision_of_a_folder_is_a_warning(llama: Suite, tmp_path: Path) -> None:
    result = run("check", document(llama, models=[{"model": f"{llama.experts[0].path}@main"}]), tmp_path)
    assert result.exit_code == 0, result.output
    assert "where there are no revisions" in result.output


def test_too_many_adapters_in_words_of_ours(llama: Suite, tmp_path: Path) -> None:
    result = run("check", document(llama, models=[{"model": "owner/a+owner/b+owner/c"}]), tmp_path)
    assert "a model must be BASE or BASE+ADAPTER; got owner/a+owner/b+owner/c" in result.output
