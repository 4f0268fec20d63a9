"""A recipe whose experts are `base+adapter`, as a merge of the adapters alone."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_ace.adapters.request import Request, model_name
from mergekit_ace.adapters.truncation import Rank
from mergekit_ace.checkpoints.adapter_folders import base_of_adapter
from mergekit_ace.factors.model import Adapter
from mergekit_ace.factors.opening import open_adapter
from mergekit_ace.factors.tensors import AdapterError
from mergekit_ace.methods import METHODS
from mergekit_ace.methods.layerwise import LayerwiseMethod
from mergekit_ace.methods.tensors.model_depth import depth_of

LOG = logging.getLogger("mergekit_ace")


def request_of(config: MergeConfiguration, options: MergeOptions, *, rank: Rank = None) -> Request:
    """What a recipe asks for, read from its adapters; the base is not opened, but for its `config.json` if it is there.

    Args:
        config: the recipe.
        options: where models from a hub are kept.
        rank: of the merged adapter.

    Raises:
        AdapterError: the recipe holds more than adapters of one base, or one of them cannot be merged.
    """
    method = method_called(config.merge_method)
    models = _experts(config)
    base = config.base_model
    assert base is not None
    folder = Path(base.model.path)
    adapters = []
    for model, _ in models:
        adapter = open_adapter(_local(model, options), name=_name(model, [m for m, _ in models]), base=folder)
        _compare_bases(adapter, base)
        adapters.append(adapter)
    return Request(
        adapters=tuple(adapters),
        method=method,
        shared=config.parameters,
        own=[parameters for _, parameters in models],
        base=base.model.path,
        rank=rank,
        dtype=_dtype(config),
        layers=depth_of([base]) if folder.is_dir() else None,
    )


def method_called(name: str) -> LayerwiseMethod:
    """The method of the catalogue.

    Raises:
        AdapterError: it is not one of ours, whose results are adapters.
    """
    found = next((method for method in METHODS if method.name == name), None)
    if found is None:
        raise AdapterError(
            f"merge_method must be one that gives an adapter: {', '.join(known.name for known in METHODS)}; got {name}"
        )
    return found


def _experts(config: MergeConfiguration) -> list[tuple[ModelReference, Any]]:
    if not config.models:
        raise AdapterError("a recipe for --adapter must list models; it has slices or modules. Merge without --adapter")
    if config.tokenizer is not None or config.tokenizer_source is not None:
        raise AdapterError(
            "a recipe for --adapter must have no tokenizer, which changes the base's tables. Merge without --adapter"
        )
    if config.base_model is None or config.base_model.lora is not None:
        raise AdapterError("a recipe for --adapter must name its base_model, a model without an adapter")
    experts = [(entry.model, entry.parameters) for entry in config.models if entry.model != config.base_model]
    for model, _ in experts:
        if model.lora is None:
            raise AdapterError(f"models of a recipe for --adapter must be base+adapter; {_other_kind(model, config)}")
        if model.model != config.base_model.model:
            raise AdapterError(
                f"adapters must be put on the recipe's base_model {config.base_model}; {model} is put on "
                f"{model.model}. Merge adapters of one base model"
            )
    if not experts:
        raise AdapterError("a recipe for --adapter must list at least one base+adapter; it lists none")
    return experts


def _other_kind(model: ModelReference, config: MergeConfiguration) -> str:
    if base_of_adapter(Path(model.model.path)) is not None:
        return f"{model} is an adapter alone. Write {config.base_model}+{model}"
    return f"{model} is a whole model. Extract an adapter from it (mergekit-extract-lora), or merge without --adapter"


def _local(model: ModelReference, options: MergeOptions) -> Path:
    """The adapter's folder; fetched as mergekit fetches models, if it is none of this machine.

    Raises:
        AdapterError: it cannot be fetched.
    """
    assert model.lora is not None
    path = Path(model.lora.path)
    if path.exists() or model.lora.path.startswith((".", "/", "~")) or model.lora.path.count("/") > 1:
        return path
    try:
        return Path(ModelReference(model=model.lora).local_path(options.transformers_cache))
    except Exception as error:  # of the hub, of the network and of its libraries
        absent = isinstance(error, RepositoryNotFoundError | RevisionNotFoundError | HFValidationError)
        why = (
            "the hub has none of this name, or not for you" if absent else f"it cannot be fetched: {_first_line(error)}"
        )
        raise AdapterError(
            f"the adapter {model.lora} must be a folder, or a repository of the Hugging Face Hub; there is no folder "
            f"{path}, and {why}. Check the spelling"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _name(model: ModelReference, models: list[ModelReference]) -> str:
    """The last part of the path, where that tells the adapters apart."""
    assert model.lora is not None
    short = model_name(model.lora.path)
    alike = [other for other in models if other.lora is not None and model_name(other.lora.path) == short]
    return short if len(alike) == 1 else model.lora.path


def _compare_bases(adapter: Adapter, base: ModelReference) -> None:
    if adapter.base and model_name(adapter.base) != model_name(base.model.path):
        LOG.warning(
            "The adapter %s was trained on %s, but is put on %s. Make sure that both are the same model.",
            adapter.name,
            adapter.base,
            base.model.path,
        )


def _dtype(config: MergeConfiguration) -> torch.dtype:
    return dtype_from_name(config.out_dtype or config.dtype) or torch.float32
