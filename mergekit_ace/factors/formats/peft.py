"""peft's layout: `adapter_config.json`, and `base_model.model.<module>.lora_A.weight`.

What peft 0.21 computes from these, read in its source: `layer.py` (scaling, embeddings, convolutions, `ParamWrapper`),
`other.py` (`get_pattern_key`), `adalora/layer.py`, `loha/layer.py`, `lokr/layer.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from mergekit_ace.factors import conversion
from mergekit_ace.factors.formats.peft_keys import sorted_keys
from mergekit_ace.factors.formats.peft_parameters import Shape, named, without_wrappers
from mergekit_ace.factors.formats.peft_settings import (
    WAY_AROUND,
    configured,
    configured_rank,
    configured_scale,
    kind_of,
    require_convertible,
)
from mergekit_ace.factors.formats.shapes import require_loha, require_lokr
from mergekit_ace.factors.model import Adapter, Place, TokenRows, Update, Vector
from mergekit_ace.factors.tensors import AdapterError, Tensors
from mergekit_ace.linalg.factors import Factors


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
    require_convertible(settings, name=name)
    return _Reader(tensors, settings, name, conv1d).adapter()


class _Reader:
    """Makes updates of the modules that keys belong to."""

    def __init__(
        self,
        tensors: Tensors,
        settings: Mapping[str, Any],
        name: str,
        conv1d: Callable[[str], bool] | None,
    ) -> None:
        self._tensors = tensors
        self._settings = settings
        self._kind = kind_of(settings)
        self._name = name
        self._conv1d = conv1d or (lambda module: False)
        self._keys = sorted_keys(tensors, adapter=name)

    def adapter(self) -> Adapter:
        declared = self._declared()
        keys = self._keys
        updates = [self._update(module, parts, declared) for module, parts in keys.modules.items()]
        if not (updates or keys.replaced or keys.tokens):
            raise AdapterError(f"adapter {self._name} must hold LoRA factors; it holds no tensor that peft knows")
        base = self._settings.get("base_model_name_or_path")
        return Adapter(
            name=self._name,
            layout="peft",
            base=str(base) if base else None,
            updates={update.place.weight: update for update in updates},
            bias_updates={module: self._bias(module, key) for module, key in keys.biases.items()},
            replaced={tensor: self._vector(key) for tensor, key in keys.replaced.items()},
            tokens={
                module: TokenRows(indices=self._indices(module, key), rows=self._vector(key))
                for module, key in keys.tokens.items()
            },
            settings=self._settings,
        )

    def _update(self, module: str, parts: Mapping[str, str], declared: Mapping[str, tuple[str, str]]) -> Update:
        shapes = {part: self._tensors.shape(key) for part, key in parts.items()}
        if "lora_magnitude_vector" in parts:
            raise AdapterError(
                f"adapter {self._name} must be an update B A of the base; {module} has DoRA's magnitudes. {WAY_AROUND}"
            )
        if "lora_embedding_A" in parts or "lora_embedding_B" in parts:
            return self._embedding(module, parts, shapes)
        if self._kind == "LOHA":
            return self._loha(module, parts, shapes)
        if self._kind == "LOKR":
            return self._lokr(module, parts, shapes)
        self._require(module, shapes, "lora_A", "lora_B", *(["lora_E"] if self._kind == "ADALORA" else []))
        if module in declared:
            return self._stack(module, parts, shapes, *declared[module])
        rank = shapes["lora_A"][0]
        self._require_rank(module, rank, shapes["lora_B"][1])
        read: Callable[[], Factors]
        if self._kind == "ADALORA":
            alpha = self._setting("lora_alpha", module)
            read = lambda: conversion.from_adalora(  # noqa: E731
                self._tensors[parts["lora_A"]], self._tensors[parts["lora_B"]], self._tensors[parts["lora_E"]], alpha
            )
        else:
            self._require_rank(module, self._rank(module), rank)
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

    def _declared(self) -> dict[str, tuple[str, str]]:
        """Of each wrapper of a parameter: how its weight is called, and the name that patterns are held against.

        The first is the wrapper's own where the parameter cannot be told.
        """
        owners: dict[str, dict[str, Shape]] = defaultdict(dict)
        targets: dict[str, tuple[str, ...]] = {}
        for module, parts in self._keys.modules.items():
            if self._kind == "LORA" and {"lora_A", "lora_B"} <= parts.keys():
                down, up = (self._tensors.shape(parts[part]) for part in ("lora_A", "lora_B"))
                if len(down) == len(up) == 2 and (parameters := self._parameters(module, down[0])):
                    owner = without_wrappers(module)
                    owners[owner][module] = (up[0], down[1])
                    targets[owner] = parameters
        declared = {}
        for owner, modules in owners.items():
            names = named(modules, targets[owner])
            if not names:
                self._require_alike(owner, targets[owner])
            for module in modules:
                name = f"{owner}.{names.get(module, targets[owner][0])}"
                declared[module] = (name if names else module, name)
        return declared

    def _require_alike(self, owner: str, parameters: tuple[str, ...]) -> None:
        """Refuse patterns that tell parameters apart where the keys do not."""
        for option in ("r", "lora_alpha"):
            if len({self._setting(option, f"{owner}.{parameter}") for parameter in parameters}) > 1:
                raise AdapterError(
                    f"adapter {self._name}: the parameters of {owner} must have the same {option}, because its keys do "
                    f"not tell which is which; they are {', '.join(parameters)}. {WAY_AROUND}"
                )

    def _stack(
        self, module: str, parts: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], declared: str, name: str
    ) -> Update:
        rank = self._rank(name)
        rows, n = shapes["lora_A"]
        self._require_rank(module, rows, shapes["lora_B"][1])
        if rows % rank:
            raise AdapterError(
                f"adapter {self._name}: {module} must have a multiple of its rank {rank} rows; got {rows}"
            )
        experts, scale = rows // rank, self._scale(name, rank)
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
        require_loha(shapes, adapter=self._name, module=module)
        scale = self._lycoris_scale(module)
        return Update(
            place=Place(module=module, kind="linear", shape=(shapes["hada_w1_a"][0], shapes["hada_w1_b"][1])),
            rank=conversion.loha_rank(shapes),
            read=lambda: conversion.from_loha(self._all(parts), scale),
        )

    def _lokr(self, module: str, parts: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> Update:
        self._require_no_kernel(module, shapes)
        require_lokr(shapes, adapter=self._name, module=module)
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
        scale = self._scale(module, self._rank(module))
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

    def _setting(self, option: str, module: str) -> float:
        return configured(self._settings, option, module, name=self._name)

    def _rank(self, module: str) -> int:
        return configured_rank(self._settings, module, name=self._name)

    def _scale(self, module: str, rank: int) -> float:
        return configured_scale(self._settings, module, rank, name=self._name)

    def _lycoris_scale(self, module: str) -> float:
        return self._setting("alpha", module) / self._rank(module)

    def _transposed(self, module: str) -> bool:
        return bool(self._settings.get("fan_in_fan_out")) or self._conv1d(module)

    def _parameters(self, module: str, rows: int) -> tuple[str, ...]:
        """Parameters of a module that the adapter targets by themselves (`target_parameters`).

        A target without a module's name is any parameter of that name. A layer beside it has as many rows as its rank.
        """
        owner = without_wrappers(module)
        found = set()
        for target in self._settings.get("target_parameters") or []:
            path, _, leaf = str(target).rpartition(".")
            if _is_suffix(path, owner) if path else rows != self._rank(owner):
                found.add(leaf)
        return tuple(sorted(found))

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
                f"whose update is no product of two stored factors. {WAY_AROUND}"
            )


def _is_suffix(suffix: str, name: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")
