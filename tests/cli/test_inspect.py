"""`mergekit-ace inspect`, as a person runs it."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mergekit_ace.cli import inspect as command
from mergekit_ace.cli import main
from mergekit_ace.report.as_json import read_json
from mergekit_ace.report.model import TensorReport
from tests.checkpoints import Suite, Update, make_suite
from tests.report.recipes import document, write


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    return make_suite("llama", tmp_path_factory.mktemp("llama"), update=Update.UNEVEN)


@pytest.fixture(scope="module")
def recipe(suite: Suite, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(document(suite), tmp_path_factory.mktemp("recipe") / "recipe.yml")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["inspect", *map(str, arguments)])


def test_everything_is_written_and_the_summary_shown(recipe: Path, tmp_path: Path) -> None:
    files = {name: tmp_path / f"report.{name}" for name in ("json", "csv", "html")}
    options = [part for name, file in files.items() for part in (f"--{name}", file)]
    result = run(recipe, *options, "--png", tmp_path / "png", "--spectra", "*.0.*q_proj*")
    assert result.exit_code == 0, result.output
    report = read_json(files["json"])
    assert report.complete
    assert report.mode == "full"
    with files["csv"].open(newline="") as table:
        assert [row["name"] for row in csv.DictReader(table)] == [tensor.name for tensor in report.tensors]
    page = files["html"].read_text()
    assert '<option value="spectrum-0">model.layers.0.self_attn.q_proj.weight</option>\n</select>' in page
    assert len(list((tmp_path / "png").glob("*.png"))) == 6
    assert "21  heterogeneous" in result.output
    assert "highest for" in result.output
    assert "tensors of highest loss" in result.output


def test_a_fast_pass_writes_less(recipe: Path, tmp_path: Path) -> None:
    result = run(recipe, "--fast", "--json", tmp_path / "report.json")
    assert result.exit_code == 0, result.output
    report = read_json(tmp_path / "report.json")
    assert report.mode == "fast"
    assert all(tensor.merged is None for tensor in report.tensors)
    assert "fast pass" in result.output


def test_an_interrupt_leaves_what_was_measured_in_order(recipe: Path, tmp_path: Path, monkeypatch: Any) -> None:
    whole = command.inspect_tensor
    calls = 0

    def interrupted(*arguments: Any, **options: Any) -> Iterator[TensorReport]:
        nonlocal calls
        calls += 1
        if calls > 5:
            raise KeyboardInterrupt
        return whole(*arguments, **options)

    monkeypatch.setattr(command, "inspect_tensor", interrupted)
    result = run(recipe, "--fast", "--json", tmp_path / "report.json", "--html", tmp_path / "report.html")
    assert result.exit_code == 130
    report = read_json(tmp_path / "report.json")
    assert not report.complete
    assert len(report.tensors) == 5
    assert report.tensors[0].name == "model.embed_tokens.weight"
    assert "Interrupted" in (tmp_path / "report.html").read_text()
    assert "interrupted" in result.output


def test_a_merge_that_would_fail_is_status_1(suite: Suite, tmp_path: Path) -> None:
    recipe = write(document(suite, models=[{"model": str(suite.base.path)}]), tmp_path / "recipe.yml")
    result = run(recipe, "--fast")
    assert result.exit_code == 1
    assert result.output


def test_a_recipe_that_cannot_be_planned_is_status_1(tmp_path: Path) -> None:
    (tmp_path / "recipe.yml").write_text("merge_method: [")
    result = run(tmp_path / "recipe.yml")
    assert result.exit_code == 1
    assert "must be a YAML file" in result.output


@pytest.mark.parametrize("arguments", [["nowhere.yml"], [], ["--no-such-option"]])
def test_a_wrong_command_line_is_status_2(arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


def test_an_output_that_cannot_be_written_is_told_before_measuring(recipe: Path, tmp_path: Path) -> None:
    result = run(recipe, "--json", tmp_path / "nowhere" / "report.json")
    assert result.exit_code == 2
    assert "must exist" in result.output


def test_a_dash_is_no_file(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(recipe, "--json", "-")
    assert result.exit_code == 2
    assert "must be a file" in result.output
    assert not Path("-").exists()


def test_a_sample_and_patterns_measure_some_tensors_and_say_so(recipe: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    result = run(recipe, "--fast", "--sample", 2, "--only-tensors", "*.mlp.*", "--json", file)
    assert result.exit_code == 0, result.output
    report = read_json(file)
    kinds = ("gate", "up", "down")
    expected = {f"model.layers.{depth}.mlp.{kind}_proj.weight" for depth in (0, 2) for kind in kinds}
    assert {tensor.name for tensor in report.tensors} == expected
    assert [tensor.depth for tensor in report.tensors] == [0, 0, 0, 2, 2, 2]
    assert report.planned == 30
    assert report.selection == "Measured 6 of 30 tensors: names that match *.mlp.*, 2 of each layer type."
    assert report.selection in result.output


@pytest.mark.parametrize("option", ["--only-tensors", "--spectra"])
def test_a_pattern_that_matches_nothing_is_status_2(option: str, recipe: Path) -> None:
    result = run(recipe, option, "*.mpl.*")
    assert result.exit_code == 2
    assert "got '*.mpl.*', which matches none of 30" in result.output


def test_spectra_are_measured_of_what_is_drawn_only(recipe: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    for options, expected in (((), 0), (("--html", tmp_path / "page.html"), 2), (("--spectra", "*q_proj*"), 3)):
        result = run(recipe, "--json", file, "--only-tensors", "*.[qk]_proj.*", *options)
        assert result.exit_code == 0, result.output
        found = [t for t in read_json(file).tensors if t.merged is not None and t.merged.spectrum is not None]
        assert len(found) == expected
