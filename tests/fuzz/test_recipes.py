"""Whatever a recipe says, `check` answers, and where it finds no error the merge succeeds."""

import tempfile
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import yaml
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings

from mergekit_ace.cli import main
from tests.checkpoints import Suite, make_suite, read_tensors
from tests.commands import mergekit_yaml
from tests.fuzz.recipes import Document, broken


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no folder is taken for a name on a hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    return make_suite("llama", tmp_path_factory.mktemp("suite"), experts=2)


def working(*, sliced: bool) -> Document:
    """A recipe with a bit of everything; BASE and EXPERT0, EXPERT1 stand for the models' folders."""
    models = [{"model": f"EXPERT{t}", "parameters": {"weight": 1.0 + t}} for t in range(2)]
    recipe: Document = {
        "merge_method": "ace",
        "base_model": "BASE",
        "parameters": {
            "epsilon": [{"filter": "down_proj", "value": 1e-3}, {"value": "auto"}],
            "lambda": [0.9, 1.0],
            "embeddings": "average",
        },
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    if not sliced:
        return {**recipe, "models": models}
    sources = [{**model, "layer_range": [0, 2]} for model in models]
    return {**recipe, "slices": [{"sources": [{"model": "BASE", "layer_range": [0, 2]}, *sources]}]}


def located(document: Document, suite: Suite) -> str:
    """The recipe's text with the models' folders in it."""
    text = yaml.safe_dump(document, sort_keys=False).replace("BASE", str(suite.base.path))
    for t, expert in enumerate(suite.experts):
        text = text.replace(f"EXPERT{t}", str(expert.path))
    return text


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(document=broken(working(sliced=False)) | broken(working(sliced=True)))
def test_check_answers_and_the_merge_agrees(document: Document, suite: Suite) -> None:
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder, "recipe.yml")
        recipe.write_text(located(document, suite))
        result = CliRunner().invoke(main, ["check", str(recipe)])
        assert result.exit_code in (0, 1), result.output
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        assert "\x1b" not in result.output
        if result.exit_code == 0:
            merged = read_tensors(mergekit_yaml(recipe.read_text(), Path(folder, "out")))
            assert all(bool(torch.isfinite(tensor).all()) for tensor in merged.values()), result.output
