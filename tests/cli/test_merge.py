"""`mergekit-ace merge`: what mergekit-yaml writes, all or nothing."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from mergekit.merge_methods import registry
from mergekit.options import MergeOptions
from safetensors.torch import load_file

from mergekit_ace.checkpoints.headers import TensorHeader
from mergekit_ace.recipe.failures import RecipeError
from mergekit_ace.recipe.planning import planned
from mergekit_ace.recipe.reading import read_recipe
from tests.checkpoints import Suite, edit_tensors, make_suite
from tests.cli.conftest import Invoke
from tests.commands import mergekit_yaml


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def comparable(found: dict[str, bytes]) -> dict[str, bytes]:
    """Without our record, and with a card in which the models have no order: mergekit lists them in that of a set."""
    return {
        name: b"\n".join(sorted(text.split(b"\n"))) if name == "README.md" else text
        for name, text in found.items()
        if name != "mergekit-ace.json"
    }


@pytest.mark.parametrize("flags", [["--copy-tokenizer"], ["--out-shard-size", "20K", "--no-write-model-card"]], ids=str)
def test_output_is_what_mergekit_yaml_writes(flags: list[str], recipe: Path, tmp_path: Path, invoke: Invoke) -> None:
    (tmp_path / "theirs").mkdir()
    theirs = mergekit_yaml(recipe.read_text(), tmp_path / "theirs" / "out", "--quiet", *flags)
    result = invoke(
        "merge",
        recipe,
        tmp_path / "ours" / "out",
        "--quiet",
        *([] if flags[0] == "--copy-tokenizer" else ["--no-copy-tokenizer"]),
        *flags,
    )
    assert result.exit_code == 0, result.output
    assert comparable(files(tmp_path / "ours" / "out")) == comparable(files(theirs))
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["out"]


def test_methods_are_registered_without_the_hook(
    recipe: Path, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_METHODS", {"linear": registry.get("linear")})
    result = invoke("merge", recipe, tmp_path / "out", "--quiet")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("out_dtype", [None, "bfloat16"])
@pytest.mark.parametrize(
    ("family", "storage"), [("llama-tied", "sharded pickle"), ("mixtral", "safetensors"), ("gpt2", "pickle")]
)
def test_the_plan_knows_the_output(
    family: str, storage: str, out_dtype: str | None, tmp_path: Path, invoke: Invoke
) -> None:
    suite = make_suite(family, tmp_path, experts=1, storage=storage)  # type: ignore[arg-type]
    recipe = tmp_path / "recipe.yml"
    document = {
        "merge_method": "ace",
        "base_model": str(suite.base.path),
        "models": [{"model": str(suite.experts[0].path)}],
    }
    recipe.write_text(yaml.safe_dump(document | ({"out_dtype": out_dtype} if out_dtype else {})))
    with planned(read_recipe(recipe), MergeOptions()) as plan:
        outputs = {tensor.name: tensor.output for tensor in plan.tensors}
    result = invoke("merge", recipe, tmp_path / "out", "--quiet", "--no-copy-tokenizer")
    assert result.exit_code == 0, result.output
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert outputs == {
        name: TensorHeader(shape=tuple(tensor.shape), dtype=tensor.dtype) for name, tensor in merged.items()
    }


def test_a_folder_that_is_taken_is_replaced_only_with_overwrite(recipe: Path, tmp_path: Path, invoke: Invoke) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    result = invoke("merge", recipe, out, "--quiet")
    assert result.exit_code == 1
    assert "Pass --overwrite" in result.stderr
    assert files(out) == {"config.json": b"old"}
    result = invoke("merge", recipe, out, "--quiet", "--overwrite")
    assert result.exit_code == 0, result.output
    assert "model.safetensors" in files(out)


def test_inputs_are_never_overwritten(tmp_path: Path, invoke: Invoke) -> None:
    suite = make_suite("llama", tmp_path / "models", experts=1)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "merge_method": "ace",
                "base_model": str(suite.base.path),
                "models": [{"model": str(suite.experts[0].path)}],
            }
        )
    )
    before = files(tmp_path)
    for out in (suite.base.path, suite.experts[0].path, tmp_path / "models", tmp_path):
        result = invoke("merge", recipe, out, "--quiet", "--overwrite")
        assert result.exit_code == 1
        assert "output folder must not hold what the merge reads" in result.stderr
    assert files(tmp_path) == before


@pytest.mark.parametrize("old", [None, "old"])
def test_a_merge_that_fails_leaves_what_was_there(old: str | None, tmp_path: Path, invoke: Invoke) -> None:
    suite = make_suite("llama", tmp_path / "models", experts=2)
    name = "model.layers.2.mlp.up_proj.weight"
    with edit_tensors(suite.experts[1].path / "model.safetensors") as tensors:
        tensors[name][1, 2] = torch.nan
    recipe, out = tmp_path / "recipe.yml", tmp_path / "out"
    models = [{"model": str(expert.path)} for expert in suite.experts]
    recipe.write_text(yaml.safe_dump({"merge_method": "ace", "base_model": str(suite.base.path), "models": models}))
    if old:
        out.mkdir()
        (out / "config.json").write_text(old)
    before = files(tmp_path)
    result = invoke("merge", recipe, out, "--quiet", "--overwrite", "--out-shard-size", "20K")
    assert result.exit_code == 1
    assert name in result.stderr
    assert "expert1" in result.stderr
    assert "Traceback" not in result.output
    kept = {name: content for name, content in files(tmp_path).items() if not name.startswith("out.partial")}
    assert kept == before


@pytest.mark.parametrize("method", ["ace", "task_arithmetic"])
def test_weights_that_the_output_cannot_hold_are_an_error(method: str, tmp_path: Path, invoke: Invoke) -> None:
    suite = make_suite("llama", tmp_path / "models", experts=1)
    name = "model.layers.2.mlp.up_proj.weight"
    with edit_tensors(suite.experts[0].path / "model.safetensors") as tensors:
        tensors[name][1, 2] = 7e4
    recipe = {"merge_method": method, "base_model": str(suite.base.path), "out_dtype": "float16"}
    recipe |= {"models": [{"model": str(suite.experts[0].path), "parameters": {"weight": 1.0}}]}
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    result = invoke("merge", tmp_path / "recipe.yml", tmp_path / "out", "--quiet")
    assert result.exit_code == 1
    assert f"{name}: every stored weight must be finite" in result.stderr
    assert "Set out_dtype: bfloat16 or float32" in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_disk_is_looked_at_before_the_merge(
    recipe: Path, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    result = invoke("merge", recipe, tmp_path / "out", "--quiet")
    assert result.exit_code == 1
    assert "free disk space must hold the output, about" in result.stderr
    assert "got 1.0 kB at" in result.stderr
    assert not (tmp_path / "out").exists()
    assert invoke("merge", recipe, tmp_path / "out", "--quiet", "--no-check-space").exit_code == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("merge_method: [", "while parsing a flow"),
        ("- a\n- b\n", "must hold a mapping with merge_method and models; got list"),
        ("merge_method: ace\nmodels:\n  - {base}\n", "models[0] must be a mapping"),
        (
            "merge_method: ace\n---\nmerge_method: ace\n",
            "it holds several documents, with --- between them. Run mergekit-multi",
        ),
        ("merge_method: nothing\nmodels:\n  - model: {base}\n", "merge_method must be one of"),
        ("merge_method: ace\nmodels:\n  - model: {base}\n", "base"),
    ],
)
def test_a_recipe_that_is_none_is_one_message(
    text: str, message: str, suite: Suite, tmp_path: Path, invoke: Invoke
) -> None:
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(text.format(base=suite.base.path))
    result = invoke("merge", recipe, tmp_path / "out", "--quiet")
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yml"]


@pytest.mark.parametrize("command", ["check", "merge", "join"])
def test_a_size_that_is_none_is_a_usage_error(command: str, recipe: Path, tmp_path: Path, invoke: Invoke) -> None:
    """transformers writes 5GB, mergekit 5B."""
    arguments = {"check": [recipe], "merge": [recipe, tmp_path / "out"], "join": [tmp_path / "out", tmp_path]}[command]
    for size, words in (("5GB", "got '5GB'; write 5B"), ("2G", "got '2G'; write 2B"), ("20KB", "got '20KB'"), ("", "")):
        result = invoke(command, *arguments, "--out-shard-size", size)
        assert result.exit_code == 2, result.output
        assert "must be a number of bytes, such as 500M, or 5B for 5 GB" in result.stderr
        assert words in result.stderr
    assert not (tmp_path / "out").exists()


def test_verbose_shows_the_traceback(tmp_path: Path, invoke: Invoke) -> None:
    recipe = tmp_path / "recipe.yml"
    recipe.write_text("merge_method: [")
    result = invoke("merge", recipe, tmp_path / "out", "-v")
    assert isinstance(result.exception, RecipeError)


@pytest.mark.parametrize(
    "arguments",
    [["--part", "3/2"], ["--part", "one"], ["--nothing"], ["--part", "1/2", "--no-safe-serialization"], ["more"]],
)
def test_a_wrong_command_line_is_a_usage_error(
    arguments: list[str], recipe: Path, tmp_path: Path, invoke: Invoke
) -> None:
    result = invoke("merge", recipe, tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_is_not_there_is_a_usage_error(tmp_path: Path, invoke: Invoke) -> None:
    assert invoke("merge", tmp_path / "nothing.yml", tmp_path / "out").exit_code == 2


def test_help_lists_mergekits_own_options(invoke: Invoke) -> None:
    result = invoke("merge", "--help")
    assert result.exit_code == 0
    for option in ("--overwrite", "--only-tensors", "--lora-merge-cache", "--multi-gpu", "--async-write", "-j"):
        assert option in result.output
