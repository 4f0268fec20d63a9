"""peft's `adapter_config.json`: rank and scale of a module, and what keeps an update from being low-rank factors."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from typing import Any

from mergekit_ace.factors.tensors import AdapterError

WAY_AROUND = (
    "Merge it into its base (peft's merge_and_unload) and merge full models, or approximate it first by "
    "peft's convert_to_lora"
)
_CONVERTED = ("LORA", "ADALORA", "LOHA", "LOKR")
_MULTIPLICATIVE = ("OFT", "BOFT", "HRA", "IA3", "ROAD", "PSOFT", "HIRA", "OSF", "GLORA")
# Options of a LoRA with which its update is not `s B A`, or not an update of the base alone.
_VARIANTS = {
    "use_dora": "DoRA, which scales the base's own weights",
    "kasa_config": "KaSA, which truncates the base's weights",
    "use_bdlora": "BD-LoRA, whose factors are blocks",
    "use_qalora": "QALoRA, which pools the inputs",
    "arrow_config": "Arrow, which routes between adapters",
    "alora_invocation_tokens": "aLoRA, which acts after its invocation tokens alone",
    "monteclora_config": "MonteCLoRA, which samples its weights",
}
_OF_ANOTHER_BASE = ("pissa", "olora", "corda", "lora_ga")
# Starts that peft does not find again when it loads the adapter: drawn anew, or made of data or of quantization.
_NOT_FOUND_AGAIN = ("pissa_niter", "corda", "lora_ga", "loftq")
# Notes of training programs in the same file.
_NOTES = ("unsloth_fixed",)


def kind_of(settings: Mapping[str, Any]) -> str:
    """The kind of adapter, such as `LORA`."""
    return str(settings.get("peft_type", "LORA")).upper().rpartition(".")[2]


def require_convertible(settings: Mapping[str, Any], *, name: str) -> None:
    """Refuse adapters whose update is no product of two stored factors.

    Raises:
        AdapterError: naming the kind and the way around.
    """
    kind = kind_of(settings)
    if kind not in _CONVERTED:
        why = "multiplies the base's weights" if kind in _MULTIPLICATIVE else "is no product of two stored factors"
        raise AdapterError(
            f"adapter {name} must be LoRA, AdaLoRA, LoHa or LoKr; it is {kind}, which {why}. {WAY_AROUND}"
        )
    for option, what in _VARIANTS.items():
        if settings.get(option):
            raise AdapterError(f"adapter {name} must be an update B A of the base; it is {what}. {WAY_AROUND}")
    start = str(settings.get("init_lora_weights", True)).lower()
    if start.startswith(_OF_ANOTHER_BASE):
        raise AdapterError(
            f"adapter {name} must be an update of the base itself; its init_lora_weights is {start}, which changed the "
            "base's weights too. Save it again with path_initial_model_for_weight_conversion, which makes it a plain "
            "LoRA"
        )
    if start.startswith("loftq"):
        raise AdapterError(
            f"adapter {name} must be an update of the base itself; its init_lora_weights is loftq, which quantized the "
            "base's weights first. Merge it into the quantized model that it was trained on (peft's merge_and_unload), "
            "and merge full models"
        )


def lost_start(settings: Mapping[str, Any]) -> str | None:
    """The `init_lora_weights` that changed the base's weights in a way that loading the adapter does not find again."""
    start = str(settings.get("init_lora_weights", True)).lower()
    return start if start.startswith(_NOT_FOUND_AGAIN) else None


def configured(settings: Mapping[str, Any], option: str, module: str, *, name: str) -> float:
    """`r` or an alpha of a module: that of the first pattern that fits, as in peft; the common one otherwise.

    Raises:
        AdapterError: there is none, or it is no number, or a pattern is none.
    """
    patterns_name = "rank_pattern" if option == "r" else "alpha_pattern"
    patterns = settings.get(patterns_name) or {}
    if not isinstance(patterns, Mapping):
        raise AdapterError(
            f"adapter {name}: {patterns_name} of its configuration must be an object; got {type(patterns).__name__}"
        )
    for pattern, value in patterns.items():
        try:
            fits = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error as error:
            raise AdapterError(
                f"adapter {name}: keys of {patterns_name} must be regular expressions; got {pattern!r}, {error}"
            ) from error
        if fits:
            return _number(value, f"{patterns_name}[{pattern!r}]", name)
    if module in patterns:
        return _number(patterns[module], f"{patterns_name}[{module!r}]", name)
    if option not in settings:
        raise AdapterError(f"adapter {name}: its configuration must have {option}; it has none")
    return _number(settings[option], option, name)


def configured_rank(settings: Mapping[str, Any], module: str, *, name: str) -> int:
    """`r` of a module.

    Raises:
        AdapterError: as `configured`; or it is no whole number above 0.
    """
    rank = configured(settings, "r", module, name=name)
    if rank < 1 or rank != int(rank):
        raise AdapterError(f"adapter {name}: the rank of {module} must be a whole number above 0; got {rank:g}")
    return int(rank)


def configured_scale(settings: Mapping[str, Any], module: str, rank: int, *, name: str) -> float:
    """`alpha / r`, or `alpha / sqrt(r)` of rsLoRA."""
    alpha = configured(settings, "lora_alpha", module, name=name)
    return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank


def unknown_settings(settings: Mapping[str, Any]) -> list[str]:
    """Settings that are in use and that the installed peft does not know, by name: those of a later version."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    configuration = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind_of(settings))  # type: ignore[call-overload]
    if configuration is None:
        return []
    known = {*inspect.signature(configuration).parameters, *_NOTES}
    return sorted(key for key, value in settings.items() if key not in known and value not in (None, False, [], {}))


def _number(value: Any, what: str, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise AdapterError(f"adapter {name}: {what} of its configuration must be a number; got {value!r}")
    return value
