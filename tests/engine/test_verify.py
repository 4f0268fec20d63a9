"""`mergekit-ace verify`: each thing that can be wrong with a folder is found, and a right one passes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import add_adapter, edit_tensors, make_suite, save_tokenizer
from tests.cli.conftest import Invoke

FAMILIES = [
    "llama",
    "llama-tied",
    "qwen3",
    "gemma2",
    "gpt2",
    "mixtral",
    "qwen3-moe",
    "mamba",
    "olmo",
    "bert",
    "t5",
    "vit",
]


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged model in several files, with tokenizer and record, made once."""
    from click.testing import CliRunner

    from mergekit_ace.cli import main

    folder = tmp_path_factory.mktemp("merged")
    suite = make_suite("llama-tied", folder / "models", experts=1)
    save_tokenizer(suite.base.path, 96)
    (folder / "recipe.yml").write_text(
        f"merge_method: ace\nbase_model: {suite.base.path}\nmodels: [{{model: {suite.experts[0].path}}}]\n"
    )
    arguments = ["merge", str(folder / "recipe.yml"), str(folder / "out"), "--quiet", "--out-shard-size", "15K"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return folder / "out"


@pytest.fixture
def model(merged: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(merged, tmp_path / "model"))


def test_a_merged_model_passes(model: Path, invoke: Invoke) -> None:
    result = invoke("verify", model)
    assert result.exit_code == 0, result.output
    assert "nothing wrong" in result.output
    assert "note" not in result.output


def _shard(model: Path, tensor: str = "model.embed_tokens.weight") -> Path:
    index = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    return model / str(index[tensor])


def _change(model: Path, tensor: str, change: Callable[[torch.Tensor], object]) -> None:
    with edit_tensors(_shard(model, tensor)) as tensors:
        change(tensors[tensor])


def _rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def _edit(file: Path, change: Callable[[dict], object]) -> None:  # type: ignore[type-arg]
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


NORM = "model.norm.weight"
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit": (lambda m: _change(m, NORM, lambda t: t[:1].mul_(1.01)), "files are not as the merge wrote them"),
    "NaN": (lambda m: _change(m, NORM, lambda t: t[:1].fill_(torch.nan)), f"NaN or infinity: {NORM}"),
    "a tensor that is gone": (
        lambda m: _rewrite(_shard(m, NORM), lambda t: t.pop(NORM)),
        f"tensors of the architecture are missing: {NORM}",
    ),
    "a tensor twice": (
        lambda m: _rewrite(_shard(m, NORM), lambda t: t.update({"model.embed_tokens.weight": torch.zeros(1)})),
        "tensors are in more than one file: model.embed_tokens.weight",
    ),
    "a foreign tensor": (
        lambda m: _rewrite(_shard(m, NORM), lambda t: t.update({"other.weight": torch.zeros(1)})),
        "tensors are not of the architecture: other.weight",
    ),
    "another shape": (
        lambda m: _rewrite(_shard(m, NORM), lambda t: t.update({NORM: torch.ones(3)})),
        f"shape that config.json promises: {NORM} [3] for [32]",
    ),
    "another dtype": (
        lambda m: _edit(m / "config.json", lambda c: c.update(dtype="bfloat16")),
        "config.json promises bfloat16 weights; most are float32",
    ),
    "another vocabulary": (
        lambda m: _edit(m / "config.json", lambda c: c.update(vocab_size=97)),
        "tables do not have the 97 rows",
    ),
    "tokens beyond the table": (
        lambda m: _edit(m / "tokenizer.json", lambda t: t["model"]["vocab"].update({"beyond": 200})),
        "tokens have a number beyond the 96 rows of the embedding table: beyond",
    ),
    "tied weights that differ": (
        lambda m: _rewrite(_shard(m, NORM), lambda t: t.update({"lm_head.weight": torch.zeros(96, 32)})),
        "whose weights differ",
    ),
    "a shard that is gone": (lambda m: _shard(m).unlink(), "tensors are not in the file that"),
    "a truncated shard": (lambda m: _shard(m).write_bytes(_shard(m).read_bytes()[:-1]), "cannot be read"),
    "no index": (lambda m: (m / "model.safetensors.index.json").unlink(), "files of weights and no index"),
    "no configuration": (lambda m: (m / "config.json").unlink(), "must be there and be JSON"),
    "a file more": (lambda m: (m / "more.txt").write_text("more"), "files are not in mergekit-ace.json: more.txt"),
    "a file less": (lambda m: (m / "tokenizer.json").unlink(), "files of mergekit-ace.json are missing"),
    "an old shard": (
        lambda m: shutil.copy(_shard(m), m / "model-00001-of-00099.safetensors"),
        "files are not in model.safetensors.index.json: model-00001-of-00099",
    ),
    "an edited record": (
        lambda m: _edit(m / "mergekit-ace.json", lambda r: r.pop("files")),
        "must be as it was written",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault: str, model: Path, invoke: Invoke) -> None:
    spoil, message = FAULTS[fault]
    spoil(model)
    result = invoke("verify", model)
    assert result.exit_code == 1
    assert message in result.output


@pytest.mark.parametrize("family", FAMILIES)
def test_models_that_others_wrote_pass(family: str, tmp_path: Path, invoke: Invoke) -> None:
    suite = make_suite(family, tmp_path, experts=1)
    result = invoke("verify", suite.base.path)
    assert result.exit_code == 0, result.output
    assert "digests are not checked" in result.output


@pytest.fixture
def adapter(merged: Path, tmp_path: Path) -> Path:
    return add_adapter(merged, tmp_path / "adapter", rank=2, targets=["q_proj"], seed=0)


def test_an_adapter_is_verified_too(adapter: Path, invoke: Invoke) -> None:
    result = invoke("verify", adapter)
    assert result.exit_code == 0, result.output
    assert "note: this is an adapter" in result.output
    assert "in 1 file: nothing wrong" in result.output


def test_faults_of_an_adapter_are_found(adapter: Path, invoke: Invoke) -> None:
    weights = adapter / "adapter_model.safetensors"
    # An older safetensors maps the file, which is written to below.
    tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}
    name = next(name for name in tensors if "lora_B" in name)
    save_file({**tensors, name: torch.full_like(tensors[name], float("nan"))}, weights)
    result = invoke("verify", adapter)
    assert result.exit_code == 1
    assert f"tensors hold NaN or infinity: {name}" in result.output
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, weights)
    result = invoke("verify", adapter)
    assert result.exit_code == 1
    assert "1 problem" in result.output


def test_a_part_is_verified_too(tmp_path: Path, recipe: Path, invoke: Invoke) -> None:
    part = tmp_path / "part"
    assert invoke("merge", recipe, part, "--quiet", "--part", "1/1").exit_code == 0
    assert invoke("verify", part).exit_code == 0
    (part / "files" / "config.json").write_text("{}")
    result = invoke("verify", part)
    assert result.exit_code == 1
    assert "config.json, which is damaged or missing" in result.output
