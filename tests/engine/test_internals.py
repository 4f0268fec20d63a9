"""What is used of mergekit's internals is in one module, and is as that module expects."""

import ast
from pathlib import Path

import mergekit.merge
import pytest
from mergekit.plan import MergePlanner

from mergekit_ace import mergekit_internals

PACKAGE = Path(mergekit_internals.__file__).parent
INTERNAL = (
    "mergekit.plan",
    "mergekit.graph",
    "mergekit.merge",
    "mergekit.io.tasks",
    "mergekit.tokenizer",
    "mergekit.card",
)


def test_this_mergekit_is_as_expected() -> None:
    assert mergekit_internals.changes() == []


def test_a_mergekit_that_changed_is_refused_by_what_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mergekit_internals, "version", lambda name: "0.1.9")
    mergekit_internals.require_known_mergekit()  # nothing that is used has changed
    monkeypatch.setitem(mergekit_internals._FUNCTIONS, MergePlanner.plan_to_disk, "self folder")
    with pytest.raises(RuntimeError, match=r"got 0\.1\.9, where .*plan_to_disk takes"):
        mergekit_internals.require_known_mergekit()


def test_no_other_module_uses_them() -> None:
    for file in PACKAGE.rglob("*.py"):
        # Methods are imported while mergekit.merge_methods is half imported, and with it all that plans merges.
        if file.name in ("mergekit_internals.py", "quantized_inputs.py"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                within = any(f"{node.module}.".startswith(f"{module}.") for module in INTERNAL)
                if node.module == "mergekit.tokenizer.config":  # what a recipe may say
                    continue
                assert not within, f"{file} imports {node.module}"
                private = [alias.name for alias in node.names if alias.name.startswith("_")]
                assert not (node.module.startswith("mergekit.") and private), f"{file} imports {private}"


def test_nothing_of_mergekit_is_replaced() -> None:
    assert mergekit.merge.MergePlanner is MergePlanner
