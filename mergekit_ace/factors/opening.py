"""Adapters from what people have: a folder, a file, a state dict, a live `PeftModel`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mergekit_ace.factors.formats.diffusers import is_diffusers, read_diffusers
from mergekit_ace.factors.formats.kohya import is_kohya, read_kohya
from mergekit_ace.factors.formats.peft import read_peft
from mergekit_ace.factors.formats.peft_keys import PREFIX
from mergekit_ace.factors.model import Adapter
from mergekit_ace.factors.tensors import AdapterError, Tensors, open_tensors

CONFIGURATION = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_WEIGHTS = (WEIGHTS, "adapter_model.bin")
_CONV1D_FAMILIES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D = re.compile(r"(?:^|\.)(?:c_attn|q_attn|c_proj|c_fc)$")


def open_adapter(path: Path, *, name: str | None = None, base: Path | None = None) -> Adapter:
    """The adapter in a folder as peft saves it, or in a folder or file of a diffusion adapter.

    Args:
        path: folder or file.
        name: how messages call it; the path when None.
        base: of the base model; its `config.json` is read where it is there, for how weights are stored.

    Raises:
        AdapterError: there is no adapter, several, or one that cannot be merged.
    """
    name = name or str(path)
    if not path.exists():
        raise AdapterError(f"the adapter {name} must be a folder or a file; there is no {path}")
    if path.is_file():
        return _by_keys(open_tensors(path), name)
    if (path / CONFIGURATION).is_file():
        return read_peft(open_tensors(_weights_of(path, name)), _settings(path), name=name, conv1d=_conv1d(base))
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return _by_keys(open_tensors(files[0]), name)
    if inside := adapters_inside(path):
        raise AdapterError(
            f"{name} holds {len(inside)} adapters; name one of them: {', '.join(folder.name for folder in inside)}"
        )
    raise AdapterError(
        f"the adapter {name} must be a folder with {CONFIGURATION}, or one .safetensors file; it has neither"
    )


def adapters_inside(folder: Path) -> list[Path]:
    """Folders of adapters in a folder: peft saves each further adapter of a model in one of its own."""
    return sorted(inside.parent for inside in folder.glob(f"*/{CONFIGURATION}"))


def adapter_from_tensors(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any] | None = None, *, name: str
) -> Adapter:
    """The adapter of a state dict; with peft's configuration where it is peft's.

    Raises:
        AdapterError: as `open_adapter`.
    """
    opened = tensors if isinstance(tensors, Tensors) else Tensors(tensors)
    if settings is not None:
        return read_peft(opened, settings, name=name)
    return _by_keys(opened, name)


def adapters_of_model(model: Any, names: Sequence[str] | None = None) -> list[Adapter]:
    """The adapters of a live `PeftModel`, all of them or those that are named.

    Raises:
        AdapterError: it has none of that name; or as `open_adapter`.
    """
    from peft import get_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTuner

    model = getattr(model, "_orig_mod", model)  # of torch.compile
    if isinstance(model, BaseTuner):  # what a PeftModel calls base_model, whose names have another beginning
        model = model.model
    known = list(model.peft_config)
    if unknown := [name for name in names or () if name not in known]:
        raise AdapterError(
            f"the model must have the adapters that are named; it has {', '.join(known)}, not {unknown[0]}"
        )
    adapters = []
    for name in names or known:
        try:
            # "auto" would ask a hub for the base's vocabulary.
            tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        except KeyError as error:  # tokens that another adapter trains and this one does not
            raise AdapterError(
                f"peft cannot give the tensors of the adapter {name} beside the model's other adapters; it finds no "
                f"{error}. Load each adapter into a model of its own and save it, and give the folders"
            ) from error
        adapters.append(read_peft(Tensors(tensors), plain_settings(model.peft_config[name]), name=name))
    return adapters


def plain_settings(configuration: Any) -> dict[str, Any]:
    """A configuration of peft as its file holds it."""
    return {key: _plain(value) for key, value in configuration.to_dict().items()}


def _by_keys(tensors: Tensors, name: str) -> Adapter:
    names = dict.fromkeys(tensors)
    if any(key.startswith(PREFIX) for key in names):
        raise AdapterError(f"the adapter {name} must come with {CONFIGURATION}, which holds its scale; there is none")
    if is_kohya(names):
        return read_kohya(tensors, name=name)
    if is_diffusers(names):
        return read_diffusers(tensors, name=name)
    example = next(iter(names), "none")
    raise AdapterError(
        f"the adapter {name} must have the keys of peft, kohya or diffusers; it has {len(names)}, such as {example}"
    )


def _weights_of(folder: Path, name: str) -> Path:
    for file in _WEIGHTS:
        if (folder / file).is_file():
            return folder / file
    raise AdapterError(f"the adapter {name} must hold {' or '.join(_WEIGHTS)}; it holds neither")


def _settings(folder: Path) -> Mapping[str, Any]:
    file = folder / CONFIGURATION
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{file} must be a JSON file; {error}") from error
    if not isinstance(settings, Mapping):
        raise AdapterError(f"{file} must hold an object; got {type(settings).__name__}")
    return settings


def _conv1d(base: Path | None) -> Callable[[str], bool] | None:
    """Which modules of the base store their weights inputs first, by its configuration."""
    try:
        document = json.loads((base / "config.json").read_text(encoding="utf-8")) if base is not None else {}
    except (OSError, ValueError):
        return None
    if not isinstance(document, Mapping) or document.get("model_type") not in _CONV1D_FAMILIES:
        return None
    return lambda module: _CONV1D.search(module) is not None


def _plain(value: Any) -> Any:
    """Peft's configurations hold sets and enumerations, their files lists and words."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    return getattr(value, "value", value)
