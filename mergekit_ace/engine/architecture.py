"""Which tensors transformers expects of a model, by its configuration alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from mergekit_ace.recipe.failures import message_of


@dataclass(frozen=True)
class Expected:
    """A configuration compared with the names in a checkpoint."""

    shapes: dict[str, tuple[int, ...]]
    """Of the checkpoint's tensors, under the names that they have there."""
    missing: tuple[str, ...]
    foreign: tuple[str, ...]


def expected_tensors(folder: Path, names: set[str]) -> Expected | str:
    """Build the architecture without its weights and look for its tensors among `names`.

    Returns:
        Why it cannot be done, for an architecture whose code is not transformers' own.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        architecture = (config.architectures or [""])[0]
        if not hasattr(transformers, architecture or "-"):
            return f"transformers has no {architecture or 'architecture named in config.json'}"
        with torch.device("meta"):
            model = getattr(transformers, architecture)(config)
    except Exception as error:  # a configuration may be damaged in any way
        return message_of(error)
    parameters = model.state_dict()
    targets = _targets(model, sorted(names), parameters)
    stored = {target: name for name, (target, converted) in targets.items() if target in parameters and not converted}
    present = {target for target, _ in targets.values()}
    # One of several names of the same parameter is enough.
    tied = _tied(model)
    missing = [name for name in parameters if name not in present and not present & tied.get(name, set())]
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    foreign = [
        name
        for name, (target, _) in targets.items()
        if target not in parameters and not any(pattern.search(name) for pattern in ignored)
    ]
    return Expected(
        shapes={held: tuple(parameters[name].shape) for name, held in stored.items()},
        missing=tuple(sorted(missing)),
        foreign=tuple(sorted(foreign)),
    )


def _targets(model: Any, names: Sequence[str], parameters: Mapping[str, Any]) -> dict[str, tuple[str, bool]]:
    """The parameter that transformers loads each stored tensor into, and whether it is converted on the way."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    found = {}
    for name in names:
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, dict(parameters))
        found[name] = (target, pattern is not None)
    return found


def _tied(model: torch.nn.Module) -> dict[str, set[str]]:
    """Names of one parameter each, by any of them."""
    groups: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(name)
    declared = getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or {}
    config = getattr(model, "config", None)
    if isinstance(declared, dict) and getattr(config, "tie_word_embeddings", False):
        for name, other in declared.items():
            groups[id(name)] = {name, other}
    found: dict[str, set[str]] = {}
    for group in groups.values():
        for name in group:
            found.setdefault(name, set()).update(group - {name})
    return found
