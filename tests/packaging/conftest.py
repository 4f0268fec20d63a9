"""One environment with an ordinary install, for the tests that do not change it."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forks import ForkServer
from tests.packaging.environments import ROOT, Environment, clean


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        folder,
        ROOT,
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (file,) = folder.glob("mergekit_ace-*.whl")
    return file


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = Environment.create(tmp_path_factory.mktemp("environment"))
    environment.install(wheel)
    return environment


@pytest.fixture(scope="session")
def forks(installed: Environment) -> Iterator[ForkServer]:
    """Processes that have imported all that mergekit imports, but not mergekit."""
    imports = "import accelerate, click, datasets, networkx, peft, pydantic, scipy, torch, transformers"
    with ForkServer(installed.python, imports, installed.folder, clean({})) as server:
        yield server
