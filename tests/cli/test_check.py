"""`mergekit-ace check`, as a script runs it."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mergekit_ace.cli import main
from tests.checkpoints import Suite, Update, make_suite
from tests.report.recipes import document, write


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    return make_suite("llama", tmp_path_factory.mktemp("llama"), experts=2, update=Update.EVEN, scale=0.05)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["check", *map(str, arguments)])


def test_a_sound_recipe_is_status_0_and_says_what_the_merge_takes(suite: Suite, tmp_path: Path) -> None:
    result = run(write(document(suite), tmp_path / "recipe.yml"))
    assert result.exit_code == 0, result.output
    assert "0 errors, 0 warnings" in result.output
    assert "of arithmetic on this machine" in result.output


def test_an_error_is_status_1(suite: Suite, tmp_path: Path) -> None:
    result = run(write(document(suite, parameters={"epsilom": 1.0}), tmp_path / "recipe.yml"))
    assert result.exit_code == 1
    assert "error: parameters: ace has no parameter 'epsilom'" in result.output
    assert "Did you mean epsilon?" in result.output
    assert "1 error, 0 warnings" in result.output


def test_a_warning_is_status_0_unless_strict(suite: Suite, tmp_path: Path) -> None:
    recipe = write(document(suite, dtype="bfloat16"), tmp_path / "recipe.yml")
    assert run(recipe).exit_code == 0
    assert run(recipe, "--strict").exit_code == 1


def test_a_wrong_command_line_is_status_2(tmp_path: Path) -> None:
    assert run(tmp_path / "nowhere.yml").exit_code == 2
    assert run().exit_code == 2
