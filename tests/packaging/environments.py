"""Virtual environments that borrow every installed package of this one, and have only ours of their own."""

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


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
            [self.python, *arguments], cwd=empty, env=clean(variables), capture_output=True, text=True, check=False
        )


def clean(variables: Mapping[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MERGEKIT_ACE"))}
    return kept | variables
