"""A small suite of checkpoints that no test changes, and the command line in this process."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from mergekit_ace.cli import main
from tests.checkpoints import Suite, make_suite, save_tokenizer

Invoke = Callable[..., Result]


@pytest.fixture(scope="session")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    suite = make_suite("llama", tmp_path_factory.mktemp("suite"), experts=2, storage="sharded")
    save_tokenizer(suite.base.path, 96)
    return suite


@pytest.fixture
def recipe(suite: Suite, tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yml"
    models = [{"model": str(expert.path)} for expert in suite.experts]
    file.write_text(yaml.safe_dump({"merge_method": "ace", "base_model": str(suite.base.path), "models": models}))
    return file


@pytest.fixture
def invoke() -> Invoke:
    def run(*arguments: object) -> Result:
        return CliRunner().invoke(main, [str(argument) for argument in arguments])

    return run
