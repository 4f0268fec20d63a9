"""Recipes over the suites of `tests.checkpoints`, as files."""

from pathlib import Path
from typing import Any

import yaml

from tests.checkpoints import Suite


def document(suite: Suite, **entries: Any) -> dict[str, Any]:
    """The recipe that merges a suite's experts, with further or other entries."""
    recipe: dict[str, Any] = {
        "merge_method": "ace",
        "base_model": str(suite.base.path),
        "models": [{"model": str(expert.path)} for expert in suite.experts],
        "parameters": {"preset": "published"},
    }
    return recipe | entries


def write(recipe: dict[str, Any], file: Path) -> Path:
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return file
