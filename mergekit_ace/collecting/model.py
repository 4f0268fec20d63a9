"""A model of the recipe and its tokenizer, as transformers loads them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from mergekit.common import ModelReference, dtype_from_name, get_auto_cls
from mergekit.options import MergeOptions
from peft import PeftModel
from torch import nn
from transformers import AutoTokenizer
from transformers.pytorch_utils import Conv1D
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from mergekit_ace.recipe.failures import message_of


class ModelError(RuntimeError):
    """A model that cannot be run over prompts."""


def load_tokenizer(model: ModelReference, options: MergeOptions) -> Any:
    """The tokenizer of a model.

    Raises:
        ModelError: it has none.
    """
    try:
        return AutoTokenizer.from_pretrained(
            model.model.path, revision=model.model.revision, trust_remote_code=options.trust_remote_code
        )
    except Exception as error:  # transformers raises whatever the files make it stumble over
        raise ModelError(
            f"{model}: prompts need the model's tokenizer, which cannot be loaded; {message_of(error)}"
        ) from error


def load_model(
    model: ModelReference, options: MergeOptions, *, dtype: str, device: torch.device, offload: str | None
) -> nn.Module:
    """A model, its adapter merged into it, ready to run.

    Args:
        model: of the recipe.
        options: of `mergekit-yaml`.
        dtype: in which it runs; `auto` for the one it is stored in.
        device: where it runs.
        offload: a folder for what does not fit on the device and in memory; None to hold all of it on the device.

    Raises:
        ModelError: it has an encoder and a decoder, or transformers cannot load it.
    """
    config = model.config(trust_remote_code=options.trust_remote_code)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{model}: second moments can be measured of decoders and of encoders; got a model that is both"
        )
    placement: dict[str, Any] = {} if offload is None else {"device_map": "auto", "offload_folder": offload}
    try:
        loaded: Any = get_auto_cls((config.architectures or ["ForCausalLM"])[0]).from_pretrained(
            model.model.path,
            revision=model.model.revision,
            dtype="auto" if dtype == "auto" else dtype_from_name(dtype),
            trust_remote_code=options.trust_remote_code,
            **placement,
        )
        if model.lora is not None:
            loaded = PeftModel.from_pretrained(loaded, model.lora.path, revision=model.lora.revision)
            loaded = loaded.merge_and_unload()
    except Exception as error:
        raise ModelError(f"{model}: transformers cannot load the model; {message_of(error)}") from error
    if offload is None:
        loaded.to(device)
    with suppress(AttributeError):
        loaded.config.use_cache = False
    module: nn.Module = loaded.eval()
    return module


def longest_text(model: ModelReference, tokenizer: Any, options: MergeOptions) -> int:
    """The most tokens that a model takes, by its configuration and its tokenizer; 0 where neither states a limit.

    RoBERTa's positions start at 2, so that its configuration states two more than it takes.
    """
    config = model.config(trust_remote_code=options.trust_remote_code)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    stated = [int(limit) for limit in (positions, tokenizer.model_max_length) if limit]
    found = min(stated, default=0)
    return found if found < VERY_LARGE_INTEGER else 0


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module that multiplies its input by a weight matrix, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def without_head(model: nn.Module, modules: Mapping[str, nn.Module]) -> nn.Module:
    """The part of a model that has all of some modules: it need not compute the scores of a vocabulary.

    Args:
        model: of transformers.
        modules: of it, by name.
    """
    body = getattr(model, "base_model", model)
    inside = set(map(id, body.modules()))
    return body if all(id(module) in inside for module in modules.values()) else model


def inputs_first(module: nn.Module) -> bool:
    """Whether the module's weight is stored `[in, out]`."""
    return isinstance(module, Conv1D)
