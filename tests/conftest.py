"""What holds for all tests: the package under test, the random numbers, which tests are slow."""

from pathlib import Path

import pytest
import torch

import mergekit_ace

ROOT = Path(__file__).parent
# Whole checkpoints, commands, processes, environments; and what goes through every method or setting on many matrices.
# What is left runs in about a minute.
SLOW = (
    *("adapters", "benchmarks", "checks", "cli", "demo", "documentation", "end_to_end", "engine", "examples", "fuzz"),
    *("moments", "packaging", "python", "recipe", "reference", "report", "robustness", "zoo"),
    *("device/test_costs.py", "device/test_memory.py", "device/test_methods.py", "device/test_multi_gpu.py"),
    *("family/test_contract.py", "family/test_formulas.py", "family/test_range.py", "matrix/test_budget.py"),
)


def pytest_configure() -> None:
    """Refuse to test another copy of the package than the one beside these tests."""
    found = Path(mergekit_ace.__file__).resolve().parent
    if found != ROOT.parent / "mergekit_ace":
        raise pytest.UsageError(
            f"the tests of {ROOT.parent} would run on {found}: install this checkout (pip install -e .)"
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the slow ones, which `-m "not slow"` leaves out."""
    for item in items:
        place = item.path.relative_to(ROOT).as_posix()
        if place.startswith(SLOW):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Tests that draw without a generator of their own draw the same numbers in any order."""
    torch.manual_seed(0)
