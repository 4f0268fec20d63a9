"""Checkpoints on disk: whole or sharded safetensors, or pickles."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

Storage = Literal["safetensors", "sharded", "pickle", "sharded pickle"]


def save_model(model: PreTrainedModel, folder: Path, storage: Storage = "safetensors") -> Path:
    """Write the model as `from_pretrained` reads it; sharded means several files, however small the model."""
    if storage == "sharded":
        size = sum(parameter.nbytes for parameter in model.parameters())
        model.save_pretrained(folder, max_shard_size=max(size // 3, 1))
    else:
        model.save_pretrained(folder)
    if storage.endswith("pickle"):
        tensors = read_tensors(folder)
        for file in folder.glob("model*.safetensors"):
            file.unlink()
        _save_pickles(tensors, folder, shards=2 if storage.startswith("sharded") else 1)
    return folder


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint folder, under the names it has on disk."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    for file in sorted(folder.glob("pytorch_model*.bin")):
        tensors |= torch.load(file, weights_only=True)
    return tensors


@contextmanager
def edit_tensors(file: Path) -> Iterator[dict[str, Tensor]]:
    """Give the tensors of a safetensors file, and write it again with what becomes of them."""
    # What is loaded may be the file itself, mapped into memory, and older versions of safetensors write in place.
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    yield tensors
    save_file(tensors, file, metadata={"format": "pt"})


def _save_pickles(tensors: dict[str, Tensor], folder: Path, shards: int) -> None:
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    weight_map = {}
    for shard in range(shards):
        file = f"pytorch_model-{shard + 1:05d}-of-{shards:05d}.bin"
        part = {name: tensor for index, (name, tensor) in enumerate(tensors.items()) if index % shards == shard}
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
