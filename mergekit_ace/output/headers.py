"""Shapes and dtypes of a checkpoint's tensors, without reading their data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from mergekit.io import ShardedTensorIndex
from safetensors import safe_open
from torch import Tensor


class Headers(Mapping[str, Tensor]):
    """The tensors of a checkpoint on the meta device, by name; files are opened when first asked for.

    Args:
        index: mergekit's index of the checkpoint's files: safetensors, or pickles of nothing but tensors.
    """

    def __init__(self, index: ShardedTensorIndex) -> None:
        self._files = {name: Path(index.base_path, file) for name, file in index.tensor_paths.items()}
        self._tensors: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._tensors:
            self._tensors |= _read(self._files[name])
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _read(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_tensor(name).to("meta") for name in tensors.keys()}  # noqa: SIM118 -- no mapping
    tensors = torch.load(file, map_location="meta", mmap=True, weights_only=True)
    return dict(tensors.get("state_dict", tensors))
