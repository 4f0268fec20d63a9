"""Every wrong entry of a recipe is told in one run, in words of ours, before a model is looked for."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from mergekit.options import MergeOptions

from mergekit_ace.checks import whole_recipe as checking
from mergekit_ace.checks.whole_recipe import check_recipe
from mergekit_ace.cli import main
from mergekit_ace.recipe.findings import Level
from tests.report.recipes import write

SOUND: dict[str, Any] = {
    "merge_method": "ace",
    "base_model": "owner/base",
    "models": [{"model": "owner/a"}, {"model": "owner/b"}],
}
# What pydantic and Python say where nobody has put it in words.
NOT_OURS = ("validation error", "pydantic", "Input should", "Traceback", "type=", "NoneType")


def found(recipe: Any, folder: Path, level: Level = "error", **options: Any) -> list[str]:
    examination = check_recipe(write(recipe, folder / "recipe.yml"), MergeOptions(**options))
    texts = [f"{finding.what} | {finding.remedy}" for finding in examination.findings]
    assert not [word for word in NOT_OURS for text in texts if word in text]
    return [text for text, finding in zip(texts, examination.findings, strict=True) if finding.level == level]


@pytest.fixture(autouse=True)
def nothing_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(*_: object, **__: object) -> None:
        raise AssertionError("a model was looked for")

    monkeypatch.setattr(checking, "planned", look)
    monkeypatch.setattr(checking, "_of_files", look)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (
            {"dtype": "bfloat"},
            "dtype must be one of float32, bfloat16, float16, float64; got 'bfloat' | Did you mean bfloat16?",
        ),
        ({"dtype": "bf16"}, "got 'bf16' | Did you mean bfloat16?"),
        ({"dtype": "int64"}, "dtype must be one of"),
        (
            {"out_dtype": "fp16"},
            "out_dtype must be one of float32, bfloat16, float16, float64; got 'fp16' | Did you mean float16?",
        ),
        ({"out_dtype": 16}, "out_dtype must be one of"),
        ({"merge_method": "ACE"}, "got 'ACE' | Did you mean ace?"),
        ({"merge_method": "Ties"}, "got 'Ties' | Did you mean ties?"),
        ({"merge_method": None}, "merge_method is missing"),
        ({"merge_method": ["ace"]}, "merge_method must be text; got ['ace']"),
        ({"models": None}, "exactly one of models, slices and modules; got none of them"),
        ({"models": []}, "exactly one of models, slices and modules; got none of them"),
        ({"models": "owner/a"}, "models must be a list"),
        ({"models": ["owner/a"]}, "models[0] must be a mapping with model; got 'owner/a' | Write - model: owner/a."),
        ({"models": [{"parameters": {"weight": 1}}]}, "models[0] must have model"),
        ({"models": [{"model": 7}]}, "models[0].model must be a path or a name"),
        ({"slices": [{"sources": [{"model": "a", "layer_range": [0, 1]}]}]}, "got models and slices"),
        (
            {"models": [{"model": "owner/a", "weight": 2}]},
            "mergekit does not read 'weight' in models[0] | Put it under parameters",
        ),
        ({"epsilon": 1.0}, "mergekit does not read 'epsilon' in the recipe | Put it under parameters"),
        ({"parameters": {"epsilon": None}}, "parameters: epsilon must be a value"),
        ({"parameters": [1]}, "parameters must be a mapping of parameters"),
        ({"parameters": {"epsilon": {"filter": "mlp"}}}, "parameters: epsilon must have value"),
        (
            {"parameters": {"epsilon": [{"filtre": "mlp", "value": 1}]}},
            "'filtre' in parameters: epsilon | Did you mean filter?",
        ),
        ({"parameters": {"lambda": "much"}}, "parameter lambda must be a finite number; got 'much'"),
        ({"tokenizer": "base"}, "tokenizer must be a mapping with source"),
        (
            {"tokenizer": {"source": "base"}, "tokenizer_source": "base"},
            "either tokenizer_source or tokenizer; got both",
        ),
        (
            {"tokenizer": {"source": "base", "pad_to_multiple_of": 0}},
            "pad_to_multiple_of must be a whole number above 0",
        ),
        ({"chat_template": 3}, "chat_template must be text; got 3"),
        (
            {"merge_method": "ties", "parameters": {"density": "x", "weight": 1}},
            "parameter density must be a number; got 'x'",
        ),
    ],
)
def test_a_wrong_entry_says_what_it_must_be(entries: dict[str, Any], words: str, tmp_path: Path) -> None:
    recipe = {key: value for key, value in (SOUND | entries).items() if value is not None}
    errors = found(recipe, tmp_path)
    assert [text for text in errors if words in text], errors


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([[4, 0], [0, 4]], "layer_range must be two numbers of layers, 0 <= first < end; got [4, 0]"),
        ([[0, 4, 8], [0, 4]], "got [0, 4, 8]"),
        ([[-4, 0], [0, 4]], "got [-4, 0]"),
        (["0-4", [0, 4]], "got '0-4'"),
        ([[0, 4], [0, 3]], "slices[0] must take as many layers of every model; got 3 and 4"),
        ([None, [0, 4]], "slices[0].sources[0] must have layer_range"),
    ],
)
def test_layer_ranges(layers: list[Any], words: str, tmp_path: Path) -> None:
    sources = [{"model": f"owner/{index}", "layer_range": value} for index, value in enumerate(layers)]
    for source in sources:
        if source["layer_range"] is None:
            del source["layer_range"]
    recipe = {"merge_method": "ace", "base_model": "owner/0", "slices": [{"sources": sources}]}
    assert [text for text in found(recipe, tmp_path) if words in text]


def test_everything_wrong_is_told_in_one_run(tmp_path: Path) -> None:
    wrong = {
        "dtype": "half",
        "base_modle": "owner/base",
        "models": [{"model": "owner/a", "wieght": 1}, "owner/b"],
        "parameters": {"epsilon": -1, "lamda": 2, "spectral_fraction": 7},
        "tokenizer": {"source": "base", "pad_to_multiple_of": "8"},
    }
    errors = "\n".join(found(SOUND | wrong, tmp_path))
    for word in (
        "dtype must be",
        "base_modle",
        "wieght",
        "models[1]",
        "epsilon must be",
        "lamda",
        "spectral_fraction must be",
        "pad_to",
    ):
        assert word in errors


def test_merge_tells_all_of_it_too(tmp_path: Path) -> None:
    recipe = write(SOUND | {"dtype": "half", "merge_method": "ACE"}, tmp_path / "recipe.yml")
    result = CliRunner().invoke(main, ["merge", str(recipe), str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "Did you mean ace?" in result.output
    assert "Did you mean float16?" in result.output
    assert not (tmp_path / "out").exists()
