"""Recipes whose models are on the Hugging Face Hub, here a stand-in: headers are read, weights are not."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub.errors import HFValidationError, NotASafetensorsRepoError
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo
from mergekit.common import ModelPath
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_ace.checkpoints.hub import HubModel, hub_json, hub_model
from mergekit_ace.checks.files import check_files
from mergekit_ace.checks.quantized import quantized
from mergekit_ace.engine.driver import Request
from mergekit_ace.engine.dry_run import dry_run
from mergekit_ace.recipe.findings import Finding
from mergekit_ace.recipe.reading import Recipe
from tests.checkpoints import Family, Suite, Update, make_suite
from tests.checkpoints.decoders import TABLES
from tests.checkpoints.family import GROUPED, causal
from tests.recipe.hub import Hub, served
from tests.report.recipes import write

# Weights of more than the 100 kB that huggingface_hub reads of every file for its header.
HEADER = 100_001
SOURCE = ModelPath(path="owner/model")


def large() -> Family:

    config = transformers.LlamaConfig(
        **{**GROUPED, "hidden_size": 64, "intermediate_size": 96}, tie_word_embeddings=False
    )
    return causal("larger llama", config, tables=TABLES)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    suite: Suite = make_suite(large(), folder / "owner", experts=2, update=Update.EVEN, scale=0.05)
    assert (suite.base.path / "model.safetensors").stat().st_size > 2 * HEADER
    return folder


def check(hub: Hub, folder: Path, *experts: str, **entries: Any) -> str:
    return run(hub, folder, ["check"], *experts, **entries).stdout


def run(hub: Hub, folder: Path, words: list[str], *experts: str, **entries: Any) -> subprocess.CompletedProcess[str]:
    document = {"merge_method": "ace", "base_model": "owner/base", "models": [{"model": model} for model in experts]}
    recipe = write(document | entries, folder / "recipe.yml")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(folder / "cache"), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "mergekit_ace", words[0], str(recipe), *words[1:]]
    result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert "Traceback" not in result.stderr
    return result


def test_a_dry_run_downloads_no_weights(models: Path, tmp_path: Path) -> None:
    with served(models) as hub:
        result = run(hub, tmp_path, ["merge", "out", "--dry-run"], "owner/expert0", "owner/expert1")
    assert result.returncode == 0
    assert "model.safetensors" in result.stdout
    assert set(hub.weights.values()) == {HEADER}


def test_a_sound_recipe_is_planned_from_headers(models: Path, tmp_path: Path) -> None:
    with served(models) as hub:
        output = check(hub, tmp_path, "owner/expert0", "owner/expert1")
    assert "0 errors, 0 warnings" in output
    assert "reads " in output  # it was planned, and its cost is known
    assert set(hub.weights) == {f"owner/{name}/model.safetensors" for name in ("base", "expert0", "expert1")}
    assert set(hub.weights.values()) == {HEADER}


def asked(monkeypatch: pytest.MonkeyPatch, answer: Any, *, exists: bool = True) -> HubModel:
    """What becomes of the hub's answer: headers, or an error."""

    def metadata(*_: object, **__: object) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", metadata)
    monkeypatch.setattr(huggingface_hub, "repo_exists", lambda *_, **__: exists)
    hub_model.cache_clear()
    hub_json.cache_clear()
    return hub_model(SOURCE)


@pytest.fixture(autouse=True)
def forgetful() -> Iterator[None]:
    yield
    hub_model.cache_clear()
    hub_json.cache_clear()


def findings() -> list[Finding]:
    config = MergeConfiguration.model_validate({"merge_method": "ace", "models": [{"model": str(SOURCE)}]})
    return list(check_files(Recipe(name="recipe.yml", text="", document={}, config=config)))


def test_states_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    none = NotASafetensorsRepoError("not a safetensors repo")
    assert asked(monkeypatch, none).state == "no safetensors"
    (hint,) = findings()
    assert hint.level == "hint"
    assert f"{SOURCE} has no safetensors files" in hint.what
    assert asked(monkeypatch, none, exists=False).state == "absent"
    (error,) = findings()
    assert error.level == "error"
    assert f"{SOURCE} is no folder on this disk, and the Hugging Face Hub does not show it" in error.what
    assert asked(monkeypatch, HFValidationError("a name with spaces")).state == "absent"
    assert asked(monkeypatch, OSError("no route to host\nand more")).state == "unreachable"
    (hint,) = findings()
    assert hint.level == "hint"
    assert "cannot be asked (no route to host): it was not checked" in hint.what


def test_a_dry_run_of_pickles_names_the_model_and_the_way_around(monkeypatch: pytest.MonkeyPatch) -> None:
    asked(monkeypatch, NotASafetensorsRepoError("not a safetensors repo"))
    document = {"merge_method": "ace", "base_model": str(SOURCE), "models": [{"model": "owner/expert"}]}
    config = MergeConfiguration.model_validate(document)
    recipe = Recipe(name="recipe.yml", text="", document=document, config=config)
    with pytest.raises(ValueError, match=r"owner/.* has no safetensors files on .*hf download owner/"):
        dry_run(Request(recipe=recipe, options=MergeOptions(), out=Path("out")))


def test_a_quantized_model_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tensors = {
        "q.weight": TensorInfo(dtype="F8_E4M3", shape=[4, 4], data_offsets=(0, 16)),
        "q.weight_scale_inv": TensorInfo(dtype="F32", shape=[1, 1], data_offsets=(16, 20)),
    }
    file = SafetensorsFileMetadata(metadata={}, tensors=tensors)
    names = dict.fromkeys(tensors, "model.safetensors")
    repository = SafetensorsRepoMetadata(
        metadata=None, sharded=False, weight_map=names, files_metadata={"model.safetensors": file}
    )
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(tmp_path / "config.json"))
    model = asked(monkeypatch, repository)
    assert model.headers["q.weight"].dtype == torch.float8_e4m3fn
    assert model.loader(SOURCE).index.tensor_paths == names
    (error,) = quantized(SOURCE, str(SOURCE))
    assert f"{SOURCE} is quantized (fp8: config.json has quantization_config)" in error.what
