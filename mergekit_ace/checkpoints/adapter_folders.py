"""Folders of adapters, told from folders of models."""

from __future__ import annotations

import json
from pathlib import Path

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
"""Where peft writes an adapter's weights."""


def base_of_adapter(folder: Path) -> str | None:
    """The base that an adapter's configuration names, `BASE` where it names none; None for what is no adapter's folder.

    A folder with a `config.json` is a model's, whatever else is in it.
    """
    if (folder / "config.json").is_file() or not any((folder / name).is_file() for name in ADAPTER_FILES):
        return None
    try:
        document = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "BASE"
    named = document.get("base_model_name_or_path") if isinstance(document, dict) else None
    return named if isinstance(named, str) and named else "BASE"
