"""diffusers' layout: `unet.<module>.lora_A.weight`, or of older versions `<module>.lora.down.weight`.

Some programs leave an adapter's name in the keys, `lora_A.default.weight`. The scale is `alpha / r` of a stored alpha
or of the configuration in the file's metadata, and 1 where there is neither.
What is written has the newer names and needs no alpha.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mergekit_ace.factors import conversion
from mergekit_ace.factors.formats.peft_settings import configured_scale
from mergekit_ace.factors.formats.shapes import require_factors, scalar
from mergekit_ace.factors.model import Adapter, Place, Update
from mergekit_ace.factors.tensors import AdapterError, Tensors
from mergekit_ace.linalg.factors import Factors

_KEY = re.compile(
    r"^(?P<module>.+?)(?:\.lora|\.lora_linear_layer|_lora)?\."
    r"(?P<part>lora_A|lora_B|down|up|alpha|lora_magnitude_vector)(?:\.default)?(?:\.weight)?$"
)
_SIGN = re.compile(r"\.lora_[AB](?:\.default)?\.weight$|(?:\.lora|\.lora_linear_layer|_lora)\.(?:down|up)\.weight$")
_PARTS = {"down": "lora_A", "up": "lora_B"}
_METADATA = "lora_adapter_metadata"


def is_diffusers(names: Mapping[str, object]) -> bool:
    """Whether keys look like those of diffusers."""
    return any(_SIGN.search(name) for name in names)


def read_diffusers(tensors: Tensors, *, name: str) -> Adapter:
    """An adapter as diffusers saves it.

    Raises:
        AdapterError: its update is not low-rank factors, or the two do not fit each other.
    """
    settings = _settings(tensors, name)
    modules: dict[str, dict[str, str]] = defaultdict(dict)
    for key in tensors:
        found = _KEY.match(key)
        if found is None:
            raise AdapterError(f"adapter {name}: keys must be <module>.lora_A or lora_B, as of diffusers; got {key}")
        modules[_module(found["module"])][_PARTS.get(found["part"], found["part"])] = key
    updates = [_update(tensors, module, parts, settings, name) for module, parts in modules.items()]
    return Adapter(
        name=name, layout="diffusers", base=None, updates={update.place.weight: update for update in updates}
    )


def write_diffusers(place: Place, factors: Factors) -> dict[str, Tensor]:
    """The tensors of one merged module, to be read with a scale of 1."""
    down, up = factors.right, factors.left
    if place.kind == "convolution":
        down = down.reshape(-1, *place.shape[1:])
        up = up.reshape(*up.shape, *(1 for _ in place.shape[2:]))
    return {f"{place.module}.lora_A.weight": down, f"{place.module}.lora_B.weight": up}


def _module(name: str) -> str:
    """The module itself, where older versions name its attention processor."""
    if ".processor." not in name:
        return name
    owner, _, projection = name.partition(".processor.")
    return f"{owner}.{projection}" + (".0" if projection == "to_out" else "")


def _settings(tensors: Tensors, name: str) -> Mapping[str, Any]:
    text = tensors.metadata.get(_METADATA)
    if text is None:
        return {}
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise AdapterError(f"adapter {name}: {_METADATA} must be JSON; {error}") from error
    return settings if isinstance(settings, Mapping) else {}


def _update(tensors: Tensors, module: str, parts: Mapping[str, str], settings: Mapping[str, Any], name: str) -> Update:
    if "lora_magnitude_vector" in parts:
        raise AdapterError(
            f"adapter {name} must be an update of the base; {module} is DoRA's. Merge it into its model first"
        )
    if not {"lora_A", "lora_B"} <= parts.keys():
        raise AdapterError(f"adapter {name}: {module} must have lora_A and lora_B; it has {', '.join(sorted(parts))}")
    down, up = parts["lora_A"], parts["lora_B"]
    require_factors(tensors.shape(down), tensors.shape(up), adapter=name, module=module)
    rank, kernel = tensors.shape(down)[0], tensors.shape(down)[2:]
    component, _, inside = module.partition(".")
    own = {key.partition(".")[2]: value for key, value in settings.items() if key.startswith(f"{component}.")}
    if "alpha" in parts:
        scale = scalar(tensors[parts["alpha"]], adapter=name, what=parts["alpha"]) / rank
    else:
        scale = configured_scale(own, inside, rank, name=name) if "lora_alpha" in own else 1.0
    place = Place(
        module=module,
        kind="convolution" if kernel else "linear",
        shape=(tensors.shape(up)[0], tensors.shape(down)[1], *kernel),
    )
    return Update(place=place, rank=rank, read=lambda: conversion.from_lora(tensors[down], tensors[up], scale))
