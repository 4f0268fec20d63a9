"""Installed in any way, the methods are there; uninstalled, nothing is."""

import zipfile
from pathlib import Path

import pytest

import mergekit_ace
from tests.packaging.environments import ROOT, Environment

LOOK_UP = "from mergekit.merge_methods import get; print(get('ace').spec.name)"
FINDERS = "import sys; print([type(finder).__name__ for finder in sys.meta_path])"
MODULES = "import sys; print(*sys.modules)"


@pytest.mark.parametrize("mode", ["regular", "editable", "wheel"])
def test_methods_come_and_go_with_the_package(mode: str, wheel: Path, tmp_path: Path) -> None:
    environment = Environment.create(tmp_path / "environment")
    before = environment.run("-c", MODULES).stdout.split()

    environment.install(*{"regular": [ROOT], "editable": ["-e", ROOT], "wheel": [wheel]}[mode])
    assert "mergekit_ace_autoload.pth" in environment.installed
    after = environment.run("-c", MODULES).stdout.split()
    assert set(after) - set(before) == {"mergekit_ace", "mergekit_ace.autoload"}
    looked_up = environment.run("-c", LOOK_UP)
    assert looked_up.stdout == "ace\n", looked_up.stderr

    environment.pip("uninstall", "--yes", "mergekit-ace")
    assert environment.installed == set()
    assert environment.run("-c", MODULES).stdout.split() == before
    assert environment.run("-c", FINDERS).stderr == ""


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(f"mergekit_ace-{mergekit_ace.__version__}.dist-info/METADATA").decode()
    assert {name.split("/")[0] for name in names} == {
        "mergekit_ace",
        "mergekit_ace_autoload.pth",
        f"mergekit_ace-{mergekit_ace.__version__}.dist-info",
    }
    assert "mergekit_ace/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Dist: mergekit<0.2,>=0.1.5" in metadata


def test_start_is_silent_when_the_package_is_gone_but_the_startup_file_is_not(wheel: Path, tmp_path: Path) -> None:
    environment = Environment.create(tmp_path / "environment")
    environment.install(wheel)
    (environment.site_packages / "mergekit_ace").rename(tmp_path / "elsewhere")
    done = environment.run("-W", "error", "-c", FINDERS)
    assert done.returncode == 0
    assert done.stderr == ""
    assert "_RegistryFinder" not in done.stdout


def test_command_line_starts_without_torch(installed: Environment) -> None:
    code = (
        "import sys; from mergekit_ace.cli import main\ntry: main(['--help'])\nfinally: print('torch' in sys.modules)"
    )
    done = installed.run("-c", code)
    assert "merge" in done.stdout
    assert done.stdout.endswith("False\n"), done.stderr


@pytest.mark.parametrize("command", [["-m", "mergekit_ace"], ["bin/mergekit-ace"]], ids=["module", "script"])
def test_command_line_has_two_names(command: list[str], installed: Environment) -> None:
    script = [str(installed.folder / part) if part.startswith("bin/") else part for part in command]
    done = installed.run(*script, "--version")
    assert done.stdout == f"mergekit-ace, version {mergekit_ace.__version__}\n", done.stderr
