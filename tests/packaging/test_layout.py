"""Imports run one way: a package of the layout imports only those that stand before it in CONTRIBUTING.md."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mergekit_ace"
ORDER = (
    *("linalg", "matrix", "damaged_files", "git_lfs", "tensor_treatment", "printable", "quantization", "moments"),
    *("factors", "mergekit_internals", "staging", "checkpoints", "methods", "registration", "__init__", "autoload"),
    *("installation", "recipe", "checks", "collecting", "adapters", "engine", "report", "api", "cli", "__main__"),
)
"""Lowest first."""
LOWER_THAN_METHODS = ("linalg", "matrix", "tensor_treatment", "printable", "moments", "factors", "damaged_files")


def unit(module: str) -> str:
    """The package or module of the layout that a dotted name belongs to."""
    parts = module.split(".")
    inside = len(parts) > 1 and ((PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").exists())
    return parts[1] if inside else "__init__"


def imported(file: Path, package: str) -> set[str]:
    """Dotted names that a file imports from a package, at its top or anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == package}


def files(name: str) -> list[Path]:
    folder = PACKAGE / name
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{name}.py"]


def test_every_module_has_a_place() -> None:
    found = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert found - {"__pycache__", "py.typed"} == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_run_one_way(name: str) -> None:
    above = set(ORDER[ORDER.index(name) + 1 :])
    for file in files(name):
        wrong = {module for module in imported(file, "mergekit_ace") if unit(module) in above}
        assert wrong == set(), file


@pytest.mark.parametrize("name", LOWER_THAN_METHODS)
def test_what_is_below_the_methods_imports_no_mergekit(name: str) -> None:
    assert {module for file in files(name) for module in imported(file, "mergekit")} == set()
