"""Virtual environments that borrow every installed package of this one, and have only ours of their own."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Imports what mergekit imports, which takes seconds, and then runs each snippet in a fork of its own.
_FORK_SERVER = """
import json, os, sys, traceback
import accelerate, click, datasets, networkx, peft, pydantic, scipy, torch, transformers
assert not any(name.startswith("mergekit.") for name in sys.modules)
for line in sys.stdin:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        status = 1
        try:
            exec(json.loads(line), {"__name__": "__main__"})
            status = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(status)
    os.close(writer)
    with open(reader) as pipe:
        output = pipe.read()
    print(json.dumps([os.waitpid(child, 0)[1], output]), flush=True)
"""


@dataclass(frozen=True)
class Environment:
    """A virtual environment with its own site-packages in front of the borrowed ones."""

    folder: Path

    @classmethod
    def create(cls, folder: Path) -> "Environment":
        venv.create(folder, with_pip=False)
        environment = cls(folder)
        # As a plain path: the startup files of the borrowed folder are not read, ours among them.
        (environment.site_packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        return environment

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        return self.folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"

    @property
    def installed(self) -> set[str]:
        """What pip has put into site-packages."""
        return {entry.name for entry in self.site_packages.iterdir()} - {"borrowed.pth", "__pycache__"}

    def pip(self, *arguments: str | Path) -> None:
        command = [sys.executable, "-m", "pip", "--python", self.python, *arguments]
        subprocess.run(command, check=True, capture_output=True, text=True)

    def install(self, *what: str | Path) -> None:
        self.pip("install", "--no-index", "--no-deps", "--no-build-isolation", *what)

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run this environment's Python, in an empty folder, so that nothing is found but what is installed."""
        empty = self.folder / "empty"
        empty.mkdir(exist_ok=True)
        return subprocess.run(
            [self.python, *arguments], cwd=empty, env=_clean(variables), capture_output=True, text=True, check=False
        )


class ForkServer:
    """A process of an environment that has imported everything but mergekit, and forks to run snippets."""

    def __init__(self, environment: Environment) -> None:
        self._process = subprocess.Popen(
            [environment.python, "-c", _FORK_SERVER],
            cwd=environment.folder,
            env=_clean({}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, snippet: str) -> tuple[int, str]:
        """Exit status and output of a snippet."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(snippet), file=self._process.stdin, flush=True)
        status, output = json.loads(self._process.stdout.readline())
        return status, output

    def close(self) -> None:
        self._process.communicate()


def _clean(variables: Mapping[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MERGEKIT_ACE"))}
    return kept | variables
