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
        ({"dtype": "float8_e4m3fn"}, "got 'float8_e4m3fn' | Known: float32, bfloat16, float16, float64."),
        ({"chat_template": 3}, "chat_template must be text; got 3"),
        ({"chat_template": "chatm"}, "or a Jinja template; got 'chatm' | Did you mean chatml?"),
        ({"chat_template": "{{ short }}"}, "got '{{ short }}' | Known: auto, alpaca, chatml, exaone, llama3, mistral."),
        ({"tokenizer_source": "unoin"}, "tokenizer_source is taken for a model named 'unoin' | Did you mean union?"),
        ({"tokenizer": {"source": "Base"}}, "tokenizer.source is taken for a model named 'Base' | Did you mean base?"),
        ({"tokenizer": {"tokens": ["x"]}}, "tokenizer.tokens must be a mapping from token to source; got ['x']"),
        ({"tokenizer": {"tokens": {"<x>": 7}}}, "tokenizer.tokens: <x> must be a mapping with source, and force"),
        ({"tokenizer": {"tokens": {7: {"source": "owner/a"}}}}, "tokenizer.tokens: 7 must be text, in quotes; got 7"),
        (
            {"tokenizer": {"tokens": {"<x>": {"source": {"kind": "model_token", "model": "owner/a"}}}}},
            "tokenizer.tokens: <x> must be a mapping with source",
        ),
        (
            {"tokenizer": {"tokens": {"<x>": {"source": "owner/other"}}}},
            "tokenizer.tokens: <x> takes its row from owner/other, which is no model of this recipe | "
            "Take it from one of owner/base, owner/a, owner/b.",
        ),
        (
            {"tokenizer": {"tokens": {"<x>": {"source": "owner/a", "froce": True}}}},
            "mergekit does not read 'froce' in tokenizer.tokens: <x> | Did you mean force?",
        ),
        ({"base_model": None}, "base_model is missing | Add base_model: PATH"),
        ({"models": [{"model": "owner/base"}]}, "models must have at least 1 model beside the base for ace; got 0"),
        (
            {"models": [{"model": "owner/a"}, {"model": "owner/b"}, {"model": "owner/a"}]},
            "models[2] is owner/a, which models[0] is already; mergekit takes a model once",
        ),
        ({"merge_method": "slerp", "parameters": {"t": 0.5}}, "models must have exactly 2 models for slerp; got 3"),
        ({"merge_method": "AEC", "parameters": {"epsilon": -1}}, "parameter epsilon must be a finite number above 0"),
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


def test_a_slice_holds_its_base(tmp_path: Path) -> None:
    sources = [{"model": f"owner/{name}", "layer_range": [0, 2]} for name in "ab"]
    recipe = {"merge_method": "ace", "base_model": "owner/base", "slices": [{"sources": sources}]}
    (error,) = found(recipe, tmp_path)
    assert error.startswith("slices[0].sources must hold the base model owner/base too")
    sources.append({"model": "owner/base", "layer_range": [0, 2]})
    recipe["slices"] = [{"sources": sources}, {"sources": sources[2:]}]
    assert found(recipe, tmp_path) == [
        "slices[1].sources must have at least 1 model beside the base for ace; got 0 | List the models to merge."
    ]


def test_a_key_that_stands_twice(tmp_path: Path) -> None:
    file = write(SOUND, tmp_path / "recipe.yml")
    file.write_text(
        file.read_text() + "dtype: float32\nparameters:\n  lambda: 1\n  epsilon: 1\n  lambda: 2\ndtype: bf16\n"
    )
    findings = [finding.what for finding in check_recipe(file).findings]
    assert "dtype stands twice in one mapping, in line 6 and in line 11; mergekit takes the last" in "".join(findings)
    assert "lambda stands twice in one mapping, in line 8 and in line 10; mergekit takes the last" in "".join(findings)
    assert "'bf16'" in "".join(findings)


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
    wrong = {"dtype": "half", "merge_method": "ACE", "parameters": {"lambda": float("nan"), "preset": "publishd"}}
    recipe = write(SOUND | wrong, tmp_path / "recipe.yml")
    result = CliRunner().invoke(main, ["merge", str(recipe), str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "Did you mean ace?" in result.output
    assert "Did you mean float16?" in result.output
    assert "parameter lambda must be a finite number; got nan" in result.output
    assert "got 'publishd'" in result.output
    assert not [word for word in NOT_OURS if word in result.output]
    assert not (tmp_path / "out").exists()
