"""peft's keys sorted: which are factors of which module, biases, replaced modules, rows of token tables."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from mergekit_ace.factors.tensors import AdapterError

PREFIX = "base_model.model."
_PARTS = (
    "lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_E|lora_magnitude_vector|hada_(?:w1_a|w1_b|w2_a|w2_b|t1|t2)|"
    "lokr_(?:w1|w1_a|w1_b|w2|w2_a|w2_b|t2)"
)
_PART = re.compile(rf"^(?P<module>.+)\.(?P<part>{_PARTS})(?:\.(?P<leaf>weight|bias))?$")
_WRAPPED_BIAS = ".base_layer.bias"
_TOKENS = ".token_adapter.trainable_tokens_delta"
# A key of a model's own state dict, with the adapter's name in it.
_WITH_NAME = re.compile(
    rf"\.(?:{_PARTS}|trainable_tokens_delta)\.(?!(?:weight|bias)$)[^.]+(?:\.(?:weight|bias))?$|"
    r"\.(?:modules_to_save|original_module)\..*(?<!\.bias)$"
)
# With `bias: all` peft saves the biases of whole modules once more, under the names that they have in its wrappers.
_AGAIN = re.compile(r"\.(?:modules_to_save|original_module)\..*\.bias$")
_WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
}


@dataclass(frozen=True, kw_only=True)
class SortedKeys:
    """Keys of an adapter.

    Attributes:
        modules: of each module, the key of each of its parts.
        biases: of each module with factors, the key of its bias's update.
        replaced: keys of tensors that take the place of the base's, by the base's own names.
        tokens: of each table, the key of the changes of single rows.
    """

    modules: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    biases: dict[str, str] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)


def sorted_keys(keys: Iterable[str], *, adapter: str) -> SortedKeys:
    """Sort the keys of `adapter_model.safetensors`.

    Raises:
        AdapterError: a key is none that peft saves, and that it would pass over.
    """
    found = SortedKeys()
    for key in keys:
        if _AGAIN.search(key):
            continue
        _require_plain(key, adapter)
        part = _PART.match(key)
        if part is not None:
            module = part["module"].removeprefix(PREFIX)
            if part["leaf"] == "bias":
                found.biases[module] = key
            else:
                found.modules[module][part["part"]] = key
        elif key.endswith(_TOKENS):
            found.tokens[key.removesuffix(_TOKENS).removeprefix(PREFIX)] = key
        else:
            found.replaced[without_wrapper(key)] = key
    return found


def without_wrapper(key: str) -> str:
    """The key of a bias in a model in which its module has no adapter."""
    return f"{key.removesuffix(_WRAPPED_BIAS)}.bias" if key.endswith(_WRAPPED_BIAS) else key


def with_wrapper(key: str) -> str:
    """The key of a bias in a model in which its module has an adapter."""
    return f"{key.removesuffix('.bias')}{_WRAPPED_BIAS}"


def _require_plain(key: str, adapter: str) -> None:
    """Refuse keys that `save_pretrained` does not write, and that peft would pass over."""
    if _WITH_NAME.search(key):
        raise AdapterError(
            f"adapter {adapter}: keys must not hold an adapter's name; got {key}. "
            "Take them from peft's get_peft_model_state_dict, or give the PeftModel itself"
        )
    for part in key.split("."):
        if part in _WRAPPERS:
            raise AdapterError(
                f"adapter {adapter}: keys must be those of the model itself; got {key}, with {part} of "
                f"{_WRAPPERS[part]}, which peft passes over. Rename the keys without it"
            )
    if PREFIX in key and not key.startswith(PREFIX):
        raise AdapterError(
            f"adapter {adapter}: keys must begin with {PREFIX}; got {key}, which peft passes over. Rename the "
            f"keys without {key[: key.index(PREFIX)]}"
        )
