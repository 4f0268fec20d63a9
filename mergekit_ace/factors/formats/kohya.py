"""kohya's layout of diffusion adapters: one file, `lora_unet_<module>.lora_down.weight`, `.lora_up.weight`, `.alpha`.

Some programs keep the dots of a module's name. The scale is `alpha / r`, and 1 where there is no alpha. LyCORIS stores
LoHa and LoKr under the same names.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor

from mergekit_ace.factors import conversion
from mergekit_ace.factors.formats.shapes import require_factors, require_loha, require_lokr, scalar
from mergekit_ace.factors.model import Adapter, Place, Update
from mergekit_ace.factors.tensors import AdapterError, Tensors
from mergekit_ace.linalg.factors import Factors

_PART = re.compile(
    r"^(?P<module>.+?)\.(?P<part>lora_down|lora_up|lora_mid|alpha|dora_scale|"
    r"hada_(?:w1_a|w1_b|w2_a|w2_b|t1|t2)|lokr_(?:w1|w1_a|w1_b|w2|w2_a|w2_b|t2)|[a-z0-9_]+)(?:\.weight)?$"
)
_SIGNS = re.compile(r"\.lora_(?:down|up)\.weight$|^(?:lora|lycoris)_[^.]+\.")
_WAY_AROUND = "Merge it into its model, and merge full models"


def is_kohya(names: Mapping[str, object]) -> bool:
    """Whether keys look like kohya's."""
    return any(_SIGNS.search(name) for name in names)


def read_kohya(tensors: Tensors, *, name: str) -> Adapter:
    """An adapter as kohya's scripts save it.

    Raises:
        AdapterError: its update is not low-rank factors, or the two do not fit each other.
    """
    modules: dict[str, dict[str, str]] = defaultdict(dict)
    for key in tensors:
        found = _PART.match(key)
        if found is None:
            raise AdapterError(f"adapter {name}: keys must be <module>.<factor>, as kohya's; got {key}")
        modules[found["module"]][found["part"]] = key
    updates = [_update(tensors, module, parts, name) for module, parts in modules.items()]
    return Adapter(
        name=name,
        layout="kohya",
        base=tensors.metadata.get("ss_sd_model_name") or None,
        updates={update.place.weight: update for update in updates},
    )


def place_key(place: Place, part: str) -> str:
    """The key of a factor of a merged adapter."""
    return f"{place.module}.{part}"


def write_kohya(place: Place, factors: Factors) -> dict[str, Tensor]:
    """The tensors of one merged module; alpha is the rank, so that the scale is 1."""
    down, up = factors.right, factors.left
    if place.kind == "convolution":
        down = down.reshape(-1, *place.shape[1:])
        up = up.reshape(*up.shape, *(1 for _ in place.shape[2:]))
    return {
        place_key(place, "alpha"): down.new_tensor(float(factors.rank)),
        place_key(place, "lora_down.weight"): down,
        place_key(place, "lora_up.weight"): up,
    }


def _update(tensors: Tensors, module: str, parts: Mapping[str, str], name: str) -> Update:
    shapes = {part: tensors.shape(key) for part, key in parts.items() if part != "alpha"}
    if "dora_scale" in parts:
        raise AdapterError(f"adapter {name} must be an update of the base; {module} is DoRA's. {_WAY_AROUND}")
    alpha = scalar(tensors[parts["alpha"]], adapter=name, what=parts["alpha"]) if "alpha" in parts else None
    if "hada_w1_a" in parts or "lokr_w1" in parts or "lokr_w1_a" in parts:
        return _lycoris(tensors, module, parts, shapes, alpha, name)
    if not {"lora_down", "lora_up"} <= shapes.keys() or shapes.keys() - {"lora_down", "lora_up", "lora_mid"}:
        raise AdapterError(
            f"adapter {name}: {module} must have lora_down and lora_up alone; it has {', '.join(sorted(parts))}. "
            f"{_WAY_AROUND}"
        )
    down, up = parts["lora_down"], parts["lora_up"]
    require_factors(shapes["lora_down"], shapes["lora_up"], adapter=name, module=module)
    rank = shapes["lora_down"][0]
    scale = 1.0 if alpha is None else alpha / rank
    if "lora_mid" in parts:
        mid = parts["lora_mid"]
        place = Place(
            module=module,
            kind="convolution",
            shape=(shapes["lora_up"][0], shapes["lora_down"][1], *shapes["lora_mid"][2:]),
        )
        return Update(
            place=place,
            rank=rank,
            read=lambda: conversion.from_cp_kernel(tensors[down], tensors[mid], tensors[up], scale),
        )
    kernel = shapes["lora_down"][2:]
    place = Place(
        module=module,
        kind="convolution" if kernel else "linear",
        shape=(shapes["lora_up"][0], shapes["lora_down"][1], *kernel),
    )
    return Update(place=place, rank=rank, read=lambda: conversion.from_lora(tensors[down], tensors[up], scale))


def _lycoris(
    tensors: Tensors,
    module: str,
    parts: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    alpha: float | None,
    name: str,
) -> Update:
    kind = "LoHa" if "hada_w1_a" in parts else "LoKr"
    if other := sorted(part for part in shapes if not part.startswith(("hada_", "lokr_"))):
        raise AdapterError(
            f"adapter {name}: {module} must have the parts of {kind} alone; it has {', '.join(other)}. {_WAY_AROUND}"
        )
    # A flattened kernel looks like a matrix: only the name tells.
    if any(len(shape) != 2 for shape in shapes.values()) or "conv" in module:
        raise AdapterError(
            f"adapter {name} must hold linear layers where it is {kind}; {module} is a convolution. {_WAY_AROUND}"
        )

    def read_all() -> dict[str, Tensor]:
        return {part: tensors[key] for part, key in parts.items()}

    if kind == "LoHa":
        require_loha(shapes, adapter=name, module=module)
        rank = shapes["hada_w1_a"][1]
        scale = 1.0 if alpha is None else alpha / rank
        place = Place(module=module, kind="linear", shape=(shapes["hada_w1_a"][0], shapes["hada_w1_b"][1]))
        return Update(
            place=place, rank=conversion.loha_rank(shapes), read=lambda: conversion.from_loha(read_all(), scale)
        )
    require_lokr(shapes, adapter=name, module=module)
    m, n, rank = conversion.lokr_shape(shapes)
    factored = next((shapes[part][1] for part in ("lokr_w2_a", "lokr_w1_a") if part in shapes), None)
    # LyCORIS takes a scale of 1 where both matrices are stored whole.
    scale = 1.0 if alpha is None or factored is None else alpha / factored
    return Update(
        place=Place(module=module, kind="linear", shape=(m, n)),
        rank=rank,
        read=lambda: conversion.from_lokr(read_all(), scale),
    )
