"""Where a recipe's models lie, and what is small in them: headers of tensors and JSON files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit.common import ModelPath

from mergekit_ace.checkpoints.headers import TensorHeader, read_file, read_folder
from mergekit_ace.checkpoints.hub import hub_json, hub_model


def is_local(source: ModelPath) -> bool:
    """Whether mergekit takes it from this disk, whatever revision it names."""
    return Path(source.path).exists()


def looks_local(path: str) -> bool:
    """Whether it can only be a path: a name on the hub is `name` or `owner/name`."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1


def is_on_hub(source: ModelPath) -> bool:
    """Whether mergekit asks the Hugging Face Hub for it."""
    return not is_local(source) and not looks_local(source.path)


def model_headers(source: ModelPath) -> Mapping[str, TensorHeader]:
    """Every tensor of a model, or of a single file of tensors, by its name; empty where the hub has no list of them.

    Raises:
        OSError, RuntimeError: as `read_folder`.
    """
    path = Path(source.path)
    if path.is_file():
        return read_file(path)
    if path.is_dir():
        return read_folder(path)
    return hub_model(source).headers if is_on_hub(source) else {}


def read_json(source: ModelPath, name: str) -> Mapping[str, Any] | None:
    """One of a model's JSON files; None where there is none, the hub cannot be asked, or it is no JSON mapping.

    Of a single file of tensors, the one beside it.
    """
    if is_on_hub(source):
        return hub_json(source, name)
    path = Path(source.path)
    try:
        document = json.loads(((path.parent if path.is_file() else path) / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return document if isinstance(document, Mapping) else None
