"""The tensors of an adapter by name, read one at a time from a file, or taken from memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mergekit_ace.damaged_files import message_of
from mergekit_ace.git_lfs import pointer_words


class AdapterError(ValueError):
    """An adapter that cannot be read or merged; the message names it, what is wrong and the way around."""


class Tensors(Mapping[str, Tensor]):
    """Tensors of one adapter; `shape` and `dtype` read no data."""

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
        self._tensors = tensors
        self.metadata: Mapping[str, str] = metadata or {}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].detach()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor."""
        return tuple(self._tensors[name].shape)


class _SafetensorsFile(Tensors):
    """A safetensors file that stays open: a tensor is read when it is asked for, and not kept."""

    def __init__(self, path: Path) -> None:
        try:
            opened: Any = safe_open(path, framework="pt")
            self._file = opened
            self._names = list(self._file.keys())
            self._shapes = {name: tuple(self._file.get_slice(name).get_shape()) for name in self._names}
            super().__init__({}, self._file.metadata())
        except FileNotFoundError:
            raise
        except Exception as error:  # safetensors names what is wrong, but not the file
            raise AdapterError(f"{path} must be a whole safetensors file; {error}") from error

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]


def open_tensors(path: Path) -> Tensors:
    """The tensors of a safetensors file or of a pickle, of which no code is run.

    Raises:
        AdapterError: the file is damaged, or a pickle holds more than tensors.
        FileNotFoundError: there is none.
    """
    if (words := pointer_words(path)) is not None:
        raise AdapterError(f"{path} must be a file of tensors; {words}")
    if path.suffix == ".safetensors":
        return _SafetensorsFile(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # zip, pickle and torch each have their own
        raise AdapterError(f"{path} must be a whole file of tensors; {message_of(error)}") from error
    if not isinstance(loaded, Mapping):
        raise AdapterError(f"{path} must hold tensors by name; got {type(loaded).__name__}")
    if others := [key for key, value in loaded.items() if not isinstance(value, Tensor)]:
        what = type(loaded[others[0]]).__name__
        raise AdapterError(
            f"{path} must hold tensors alone, by name, as peft saves them; it has {others[0]!r}, of type {what}. Save "
            "the tensors alone"
        )
    return Tensors(loaded)
