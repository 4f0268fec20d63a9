"""Where `check` recommends measured second moments: adapters of a language model, merged by estimates."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from mergekit.options import MergeOptions

from mergekit_ace.checks.whole_recipe import check_recipe
from mergekit_ace.cli import main
from mergekit_ace.recipe.findings import Level
from tests.checkpoints import Suite, add_adapter, make_suite
from tests.report.recipes import document, write

WORDS = "adapters of a language model"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    return make_suite("llama", tmp_path_factory.mktemp("llama"), experts=2)


@pytest.fixture(scope="module")
def adapters(llama: Suite, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of the base, as a recipe names them."""
    folder = tmp_path_factory.mktemp("adapters")
    made = [add_adapter(llama.base.path, folder / f"a{t}", rank=2, targets=["q_proj"], seed=t) for t in range(2)]
    return [f"{llama.base.path}+{adapter}" for adapter in made]


def told(recipe: dict[str, Any], folder: Path, level: Level = "hint") -> list[str]:
    """Findings on measured moments."""
    options = MergeOptions(lora_merge_cache=str(folder / "cache"), lora_merge_dtype="float32")
    findings = check_recipe(write(recipe, folder / "my recipe.yml"), options).findings
    return [f"{f.what} {f.remedy}" for f in findings if f.level == level and ("measured ones" in f.what)]


def of_adapters(llama: Suite, names: list[str], **entries: Any) -> dict[str, Any]:
    return document(llama, **{"models": [{"model": name} for name in names], "parameters": {}, **entries})


@pytest.mark.parametrize("method", ["ace", "wudi", "actmat"])
def test_adapters_of_a_language_model(llama: Suite, adapters: list[str], tmp_path: Path, method: str) -> None:
    (hint,) = told(of_adapters(llama, adapters, merge_method=method), tmp_path)
    assert WORDS in hint
    command = f"mergekit-ace moments '{tmp_path / 'my recipe.yml'}'"
    assert f"{command} --prompts NAME=FILE --out moments" in hint
    assert f"{command} --self-prompts 32 --out moments" in hint


@pytest.mark.parametrize(
    "entries",
    [
        {"merge_method": "tsv_m"},
        {"merge_method": "wudi", "parameters": {"solver": "adam"}},
        {"merge_method": "wudi", "parameters": {"solver": "flow"}},
        {"parameters": {"preset": "published"}},
        {"parameters": {"structural_prior": True}},
        {"parameters": {"moments": "moments"}},
    ],
)
def test_settings_without_measured_moments_or_with_them(
    llama: Suite, adapters: list[str], tmp_path: Path, entries: dict[str, Any]
) -> None:
    assert told(of_adapters(llama, adapters, **entries), tmp_path) == []


def test_other_experts(llama: Suite, adapters: list[str], tmp_path: Path) -> None:
    """Full fine-tunes; an adapter beside one; one adapter alone."""
    assert told(document(llama, parameters={}), tmp_path) == []
    assert told(of_adapters(llama, [adapters[0], str(llama.experts[1].path)]), tmp_path) == []
    assert told(of_adapters(llama, adapters[:1]), tmp_path) == []


def test_adapters_of_no_language_model(llama: Suite, adapters: list[str], tmp_path: Path) -> None:
    recipe = of_adapters(llama, adapters)
    command = ["check", "--adapter", str(write(recipe, tmp_path / "recipe.yml"))]
    assert WORDS in CliRunner().invoke(main, command).output
    config = llama.base.path / "config.json"
    text = config.read_text()
    try:
        config.write_text(json.dumps(json.loads(text) | {"architectures": ["LlamaForSequenceClassification"]}))
        assert WORDS not in CliRunner().invoke(main, command).output
    finally:
        config.write_text(text)


@pytest.mark.parametrize(
    ("entries", "remedy"),
    [
        ({"parameters": {"moments": "moments", "preset": "published"}}, "preset: published"),
        ({"merge_method": "wudi", "parameters": {"moments": "moments", "solver": "flow"}}, "solver"),
    ],
)
def test_moments_beside_settings_that_take_none_are_an_error(
    llama: Suite, tmp_path: Path, entries: dict[str, Any], remedy: str
) -> None:
    (error,) = told(document(llama, **entries), tmp_path, "error")
    assert "defined of estimated second moments" in error
    assert remedy in error
