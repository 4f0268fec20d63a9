"""peft's layout: `adapter_config.json`, and `base_model.model.<module>.lora_A.weight`.

What peft 0.21 computes from these, read in its source: `layer.py` (scaling, embeddings, convolutions, `ParamWrapper`),
`other.py` (`get_pattern_key`), `adalora/layer.py`, `loha/layer.py`, `lokr/layer.py`.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from mergekit_ace.factors import conversion
from mergekit_ace.factors.model import Adapter, Factors, Place, TokenRows, Update, Vector
from mergekit_ace.factors.tensors import AdapterError, Tensors

PREFIX = "base_model.model."
_PARTS = (
    "lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_E|lora_magnitude_vector|hada_(?:w1_a|w1_b|w2_a|w2_b|t1|t2)|"
    "lokr_(?:w1|w1_a|w1_b|w2|w2_a|w2_b|t2)"
)
_PART = re.compile(rf"^(?P<module>.+)\.(?P<part>{_PARTS})(?:\.(?P<leaf>weight|bias))?$")
_TOKENS = ".token_adapter.trainable_tokens_delta"
_CONVERTED = ("LORA", "ADALORA", "LOHA", "LOKR")
_MULTIPLICATIVE = ("OFT", "BOFT", "HRA", "IA3", "ROAD", "PSOFT", "HIRA", "OSF", "GLORA")
_WAY_AROUND = (
    "Merge it into its base (peft's merge_and_unload) and merge full models, or approximate it first by "
    "peft's convert_to_lora"
)
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
_OF_ANOTHER_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")


def read_peft(
    tensors: Tensors, settings: Mapping[str, Any], *, name: str, conv1d: Callable[[str], bool] | None = None
) -> Adapter:
    """An adapter as peft saves it.

    Args:
        tensors: keys as in `adapter_model.safetensors`, without the adapter's name.
        settings: `adapter_config.json`.
        name: of the adapter, for messages.
        conv1d: whether a module stores its weight inputs first, where the base's configuration is at hand;
            `fan_in_fan_out` otherwise.

    Raises:
        AdapterError: its update is not low-rank factors, or the two do not fit each other.
    """
    kind = str(settings.get("peft_type", "LORA")).upper().rpartition(".")[2]
    _require_convertible(kind, settings, name)
    reader = _Reader(tensors, settings, kind, name, conv1d)
    for key in tensors:
        reader.sort(key)
    return reader.adapter()


def configured(settings: Mapping[str, Any], option: str, module: str, *, name: str) -> Any:
    """`r` or an alpha of a module, by its pattern if one fits: the first does, as in peft.

    Raises:
        AdapterError: the configuration is empty.
    """
    patterns = settings.get("rank_pattern" if option == "r" else "alpha_pattern") or {}
    if module in patterns:
        return patterns[module]
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    if option not in settings:
        raise AdapterError(f"adapter {name}: its configuration must have {option}; it has none")
    return settings[option]


def configured_scale(settings: Mapping[str, Any], module: str, rank: int, *, name: str) -> float:
    """`alpha / r`, or `alpha / sqrt(r)` of rsLoRA."""
    alpha = float(configured(settings, "lora_alpha", module, name=name))
    return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank


def _require_convertible(kind: str, settings: Mapping[str, Any], name: str) -> None:
    if kind not in _CONVERTED:
        why = "multiplies the base's weights" if kind in _MULTIPLICATIVE else "is no product of two stored factors"
        raise AdapterError(
            f"adapter {name} must be LoRA, AdaLoRA, LoHa or LoKr; it is {kind}, which {why}. {_WAY_AROUND}"
        )
    for option, what in _VARIANTS.items():
        if settings.get(option):
            raise AdapterError(f"adapter {name} must be an update B A of the base; it is {what}. {_WAY_AROUND}")
    start = str(settings.get("init_lora_weights", True)).lower()
    if start.startswith(_OF_ANOTHER_BASE):
        raise AdapterError(
            f"adapter {name} must be an update of the base itself; its init_lora_weights is {start}, which changed the "
            "base's weights too. Save it again with path_initial_model_for_weight_conversion, which makes it a plain "
            "LoRA"
        )


class _Reader:
    """Sorts keys into modules, and makes updates of them."""

    def __init__(
        self,
        tensors: Tensors,
        settings: Mapping[str, Any],
        kind: str,
        name: str,
        conv1d: Callable[[str], bool] | None,
    ) -> None:
        self._tensors = tensors
        self._settings = settings
        self._kind = kind
        self._name = name
        self._conv1d = conv1d or (lambda module: False)
        self._modules: dict[str, dict[str, str]] = defaultdict(dict)
        self._biases: dict[str, str] = {}
        self._replaced: dict[str, Vector] = {}
        self._tokens: dict[str, TokenRows] = {}

    def sort(self, key: str) -> None:
        found = _PART.match(key)
        if found is not None:
            module = found["module"].removeprefix(PREFIX)
            if found["leaf"] == "bias":
                self._biases[module] = key
            else:
                self._modules[module][found["part"]] = key
        elif key.endswith(_TOKENS):
            module = key.removesuffix(_TOKENS).removeprefix(PREFIX)
            self._tokens[module] = TokenRows(indices=self._indices(module, key), rows=self._vector(key))
        elif re.search(r"\.lora_[AB]\.[^.]+\.weight$", key):
            raise AdapterError(
                f"adapter {self._name}: keys must not hold an adapter's name; got {key}. "
                "Take them from peft's get_peft_model_state_dict, or give the PeftModel itself"
            )
        else:
            self._replaced[key] = self._vector(key)

    def adapter(self) -> Adapter:
        updates = [self._update(module, parts) for module, parts in self._modules.items()]
        biases = {module: self._bias(module, key) for module, key in self._biases.items()}
        if not (updates or self._replaced or self._tokens):
            raise AdapterError(f"adapter {self._name} must hold LoRA factors; it holds no tensor that peft knows")
        base = self._settings.get("base_model_name_or_path")
        return Adapter(
            name=self._name,
            layout="peft",
            base=str(base) if base else None,
            updates={update.place.weight: update for update in updates},
            bias_updates=biases,
            replaced=self._replaced,
            tokens=self._tokens,
            settings=self._settings,
        )

    def _update(self, module: str, parts: Mapping[str, str]) -> Update:
        shapes = {part: self._tensors.shape(key) for part, key in parts.items()}
        if "lora_magnitude_vector" in parts:
            raise AdapterError(
                f"adapter {self._name} must be an update B A of the base; {module} has DoRA's magnitudes. {_WAY_AROUND}"
            )
        if "lora_embedding_A" in parts or "lora_embedding_B" in parts:
            return self._embedding(module, parts, shapes)
        if self._kind == "LOHA":
            return self._loha(module, parts, shapes)
        if self._kind == "LOKR":
            return self._lokr(module, parts, shapes)
        self._require(module, shapes, "lora_A", "lora_B", *(["lora_E"] if self._kind == "ADALORA" else []))
        if parameters := self._parameters(module):
            return self._stack(module, parts, shapes, parameters)
        rank = shapes["lora_A"][0]
        self._require_rank(module, rank, shapes["lora_B"][1])
        read: Callable[[], Factors]
        if self._kind == "ADALORA":
            alpha = float(self._setting("lora_alpha", module))
            read = lambda: conversion.from_adalora(  # noqa: E731
                self._tensors[parts["lora_A"]], self._tensors[parts["lora_B"]], self._tensors[parts["lora_E"]], alpha
            )
        else:
            self._require_rank(module, int(self._setting("r", module)), rank)
            scale = self._scale(module, rank)
            read = lambda: conversion.from_lora(  # noqa: E731
                self._tensors[parts["lora_A"]], self._tensors[parts["lora_B"]], scale
            )
        kernel = shapes["lora_A"][2:]
        place = Place(
            module=module,
            kind="convolution" if kernel else "linear",
            shape=(shapes["lora_B"][0], shapes["lora_A"][1], *kernel),
            transposed=not kernel and self._transposed(module),
        )
        return Update(place=place, rank=rank, read=read)

    def _embedding(self, module: str, parts: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> Update:
        self._require(module, shapes, "lora_embedding_A", "lora_embedding_B")
        rank, vocabulary = shapes["lora_embedding_A"]
        dimensions, columns = shapes["lora_embedding_B"]
        self._require_rank(module, rank, columns)
        scale = self._scale(module, rank)
        # The table is (B A)^T: its tokens are the columns of A.
        return Update(
            place=Place(module=module, kind="embedding", shape=(dimensions, vocabulary), transposed=True),
            rank=rank,
            read=lambda: conversion.from_lora(
                self._tensors[parts["lora_embedding_A"]], self._tensors[parts["lora_embedding_B"]], scale
            ),
        )

    def _stack(
        self,
        module: str,
        parts: Mapping[str, str],
        shapes: Mapping[str, tuple[int, ...]],
        parameters: tuple[str, ...],
    ) -> Update:
        owner = without_wrappers(module)
        declared = f"{owner}.{parameters[0]}" if len(parameters) == 1 else module
        rank = int(self._setting("r", declared))
        rows, n = shapes["lora_A"]
        self._require_rank(module, rows, shapes["lora_B"][1])
        if rows % rank:
            raise AdapterError(
                f"adapter {self._name}: {module} must have a multiple of its rank {rank} rows; got {rows}"
            )
        experts, scale = rows // rank, self._scale(declared, rank)
        m = shapes["lora_B"][0]
        down, up = parts["lora_A"], parts["lora_B"]
        if experts == 1:
            place = Place(module=module, kind="linear", shape=(m, n), declared=declared)
            return Update(
                place=place,
                rank=rank,
                read=lambda: conversion.from_lora(self._tensors[down], self._tensors[up], scale),
            )
        return Update(
            place=Place(module=module, kind="stack", shape=(experts, m, n), declared=declared),
            rank=rank,
            read=lambda: conversion.from_stack(self._tensors[down], self._tensors[up], scale, experts=experts),
        )

    def _loha(self, module: str, parts: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> Update:
        self._require_no_kernel(module, shapes)
        self._require(module, shapes, "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        scale = self._lycoris_scale(module)
        return Update(
            place=Place(module=module, kind="linear", shape=(shapes["hada_w1_a"][0], shapes["hada_w1_b"][1])),
            rank=conversion.loha_rank(shapes),
            read=lambda: conversion.from_loha(self._all(parts), scale),
        )

    def _lokr(self, module: str, parts: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> Update:
        self._require_no_kernel(module, shapes)
        for factor in ("lokr_w1", "lokr_w2"):
            self._require(module, shapes, *([factor] if factor in shapes else [f"{factor}_a", f"{factor}_b"]))
        m, n, rank = conversion.lokr_shape(shapes)
        scale = self._lycoris_scale(module)
        return Update(
            place=Place(module=module, kind="linear", shape=(m, n)),
            rank=rank,
            read=lambda: conversion.from_lokr(self._all(parts), scale),
        )

    def _all(self, parts: Mapping[str, str]) -> dict[str, Tensor]:
        return {part: self._tensors[key] for part, key in parts.items()}

    def _vector(self, key: str) -> Vector:
        return Vector(shape=self._tensors.shape(key), read=partial(self._tensors.__getitem__, key))

    def _bias(self, module: str, key: str) -> Vector:
        scale = self._scale(module, int(self._setting("r", module)))
        return Vector(shape=self._tensors.shape(key), read=lambda: conversion.widened(self._tensors[key]).mul(scale))

    def _indices(self, module: str, key: str) -> tuple[int, ...]:
        given = self._settings.get("trainable_token_indices")
        if isinstance(given, Mapping):
            given = next((indices for owner, indices in given.items() if _is_suffix(owner, module)), None)
        rows = self._tensors.shape(key)[0]
        if given is None or len(given) != rows:
            raise AdapterError(
                f"adapter {self._name}: trainable_token_indices must name the {rows} rows of {key}; got {given}"
            )
        return tuple(int(index) for index in given)

    def _setting(self, option: str, module: str) -> Any:
        return configured(self._settings, option, module, name=self._name)

    def _scale(self, module: str, rank: int) -> float:
        return configured_scale(self._settings, module, rank, name=self._name)

    def _lycoris_scale(self, module: str) -> float:
        return float(self._setting("alpha", module)) / int(self._setting("r", module))

    def _transposed(self, module: str) -> bool:
        return bool(self._settings.get("fan_in_fan_out")) or self._conv1d(module)

    def _parameters(self, module: str) -> tuple[str, ...]:
        """Parameters of a module that the adapter targets by themselves (`target_parameters`)."""
        owner = without_wrappers(module)
        targets = self._settings.get("target_parameters") or []
        return tuple(
            sorted({leaf for path, _, leaf in (str(t).rpartition(".") for t in targets) if _is_suffix(path, owner)})
        )

    def _require(self, module: str, shapes: Mapping[str, tuple[int, ...]], *parts: str) -> None:
        missing = [part for part in parts if part not in shapes]
        if missing:
            raise AdapterError(f"adapter {self._name}: {module} must have {' and '.join(parts)}; it lacks {missing[0]}")
        flat = [part for part in parts if len(shapes[part]) < 2 or 0 in shapes[part]]
        if flat:
            raise AdapterError(
                f"adapter {self._name}: {module}.{flat[0]} must be a matrix; got shape {shapes[flat[0]]}, as when the "
                "parts of a distributed run were not gathered before it was saved. Save it again"
            )

    def _require_rank(self, module: str, expected: int, found: int) -> None:
        if expected != found:
            raise AdapterError(
                f"adapter {self._name}: {module} must have factors of one rank, as configured; got {expected} and "
                f"{found}"
            )

    def _require_no_kernel(self, module: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        if any(len(shape) != 2 for shape in shapes.values()) or "conv" in module.rpartition(".")[2]:
            raise AdapterError(
                f"adapter {self._name} must hold linear layers where it is {self._kind}; {module} is a convolution, "
                f"whose update is no product of two stored factors. {_WAY_AROUND}"
            )


def without_wrappers(module: str) -> str:
    """The module that holds the parameters, whose wrappers peft nests, one for each parameter."""
    while module.endswith(".base_layer"):
        module = module.removesuffix(".base_layer")
    return module


def _is_suffix(suffix: str, name: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")
