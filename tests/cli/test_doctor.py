"""`mergekit-ace doctor`: each thing that keeps merges from working is found, and named with a remedy."""

import json
import os
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from mergekit_ace.cli import main


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["doctor", *arguments])


def facts() -> dict[str, dict[str, str]]:
    return {fact["name"]: fact for fact in json.loads(run("--json").output)}


@pytest.fixture(autouse=True)
def _own_scripts_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


def test_a_sound_installation_is_status_0() -> None:
    result = run()
    assert result.exit_code == 0, result.output
    assert "Merges work here." in result.output
    for name, value in (("torch", torch.__version__), ("mergekit", "0.1.5"), ("in a new process", "armed")):
        assert re.search(rf"^  ok +{name} +{re.escape(value)}$", result.output, re.MULTILINE)
    names = [fact["name"].replace("_", "-") for fact in json.loads(run("--json").output)]
    assert len(set(names)) == len(names)


def test_a_version_that_is_not_allowed_is_named_with_the_command_that_mends_it(monkeypatch: Any) -> None:
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.2.1" if name == "mergekit" else version(name))
    found = facts()["mergekit"]
    assert (found["level"], found["value"]) == ("error", "0.2.1")
    assert found["remedy"].endswith("-m pip install 'mergekit<0.2,>=0.1.5'")
    assert run().exit_code == 1


def test_a_package_that_is_missing_is_named(monkeypatch: Any) -> None:
    version = metadata.version

    def without_peft(name: str) -> str:
        if name == "peft":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", without_peft)
    assert facts()["peft"]["value"] == "not installed"
    assert facts()["peft"]["level"] == "error"


def test_a_hook_that_is_switched_off_is_found(monkeypatch: Any) -> None:
    monkeypatch.setenv("MERGEKIT_ACE_AUTOLOAD", "0")
    found = facts()["in a new process"]
    assert (found["level"], found["value"]) == ("error", "switched off by MERGEKIT_ACE_AUTOLOAD=0")
    assert found["remedy"].startswith("Unset MERGEKIT_ACE_AUTOLOAD")
    assert run().exit_code == 1


@pytest.mark.parametrize(("value", "level"), [("1", "error"), ("0", "ok")])
def test_a_variable_that_reduces_precision_is_found(value: str, level: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", value)
    assert facts()["NVIDIA_TF32_OVERRIDE"]["level"] == level


def test_reduced_products_are_found() -> None:
    torch.set_float32_matmul_precision("high")
    try:
        found = facts()["float32 products"]
    finally:
        torch.set_float32_matmul_precision("highest")
    assert (found["level"], found["value"]) == ("error", "reduced")
    assert "set_float32_matmul_precision('highest')" in found["remedy"]


def test_a_mergekit_yaml_of_another_environment_is_a_warning(tmp_path: Path, monkeypatch: Any) -> None:
    other = tmp_path / "mergekit-yaml"
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = facts()["mergekit-yaml"]
    assert found["level"] == "warning"
    assert str(other) in found["value"]
    assert run().exit_code == 0
