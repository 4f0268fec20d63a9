"""Models of the Hugging Face Hub without their weights: headers of tensors and small files, by huggingface_hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
from huggingface_hub.errors import (
    HFValidationError,
    NotASafetensorsRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from mergekit.common import ModelPath
from mergekit.io import LazyTensorLoader, ShardedTensorIndex
from mergekit.io.lazy_tensor_loader import ShardInfo

from mergekit_ace.checkpoints.headers import TensorHeader, header_of

State = Literal["read", "absent", "no safetensors", "unreachable"]


@dataclass(frozen=True, kw_only=True)
class HubModel:
    """What the hub has of a model.

    Attributes:
        state: `read`: its headers are here; `absent`: the hub has no such model, or not for us; `no safetensors`:
            pickles have no headers that could be read alone; `unreachable`: no network, or told to stay offline.
        words: what went wrong, in the hub's words.
        headers: by name.
        files: the file of every tensor.
    """

    state: State
    words: str
    headers: Mapping[str, TensorHeader]
    files: Mapping[str, str]

    def loader(self, source: ModelPath) -> LazyTensorLoader:
        """Mergekit's loader with the model's index, which has no file to read a tensor from."""
        shards: dict[str, list[str]] = {}
        for name, file in self.files.items():
            shards.setdefault(file, []).append(name)
        index = ShardedTensorIndex(
            base_path=f"hub:{source}",
            is_safetensors=True,
            tensor_paths=dict(self.files),
            shards=[ShardInfo(file, names) for file, names in shards.items()],
        )
        return LazyTensorLoader(index)


@lru_cache(maxsize=256)
def hub_model(source: ModelPath) -> HubModel:
    """Ask the hub for a model's headers; asked once a process."""
    try:
        found = huggingface_hub.get_safetensors_metadata(source.path, revision=source.revision)
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        return _without("absent", error)
    except NotASafetensorsRepoError as error:  # also raised for models that are not there, or private
        return _without("no safetensors" if _exists(source) else "absent", error)
    except Exception as error:  # of the network, of its libraries, of a hub that is down
        return _without("unreachable", error)
    headers = {
        name: header_of(tensor.shape, tensor.dtype)
        for file in found.files_metadata.values()
        for name, tensor in file.tensors.items()
    }
    files = {name: file for name, file in found.weight_map.items() if name in headers}
    return HubModel(state="read", words="", headers={name: headers[name] for name in files}, files=files)


@lru_cache(maxsize=1024)
def hub_json(source: ModelPath, name: str) -> Mapping[str, Any] | None:
    """One of a model's JSON files; None where there is none, or the hub cannot be asked."""
    if hub_model(source).state in ("absent", "unreachable"):
        return None
    try:
        file = huggingface_hub.hf_hub_download(source.path, name, revision=source.revision)
        document = json.loads(Path(file).read_text(encoding="utf-8"))
    except Exception:  # no such file, or the network again
        return None
    return document if isinstance(document, Mapping) else None


def _exists(source: ModelPath) -> bool:
    try:
        return huggingface_hub.repo_exists(source.path)
    except Exception:  # the network has failed since; the merge reports it
        return True


def _without(state: State, error: Exception) -> HubModel:
    words = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return HubModel(state=state, words=words, headers={}, files={})
