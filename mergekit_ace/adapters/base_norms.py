"""Norms of the base's weights: how large an update is for its weight, which adapters alone do not tell."""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from mergekit.common import ModelReference
from mergekit.io import LazyTensorLoader, ShardedTensorIndex
from torch import Tensor

from mergekit_ace.damaged_files import READING, message_of
from mergekit_ace.factors.model import Place
from mergekit_ace.factors.tensors import AdapterError
from mergekit_ace.linalg.precision import squared_norm
from mergekit_ace.methods.tensors.model_depth import depth_of

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_FILES = tuple(f"{name}{end}" for name in _WEIGHTS for end in ("", ".index.json"))


def norm_of(weight: Tensor, index: int | None = None) -> float:
    """`||W||_F` of a weight, or of one matrix of a stack."""
    return math.sqrt(squared_norm(weight if index is None else weight[index]))


class BaseNorms:
    """Reads a weight of the base when it or its norm is asked for, and keeps nothing.

    Args:
        base: the base model's folder, or its name on a hub: taken from the hub's cache on this disk, and not fetched.
    """

    def __init__(self, base: str | None) -> None:
        self._base = base

    def of(self, place: Place, index: int | None = None) -> float | None:
        """`||W_0||_F` of a weight, or of one matrix of a stack; None where `weight` is.

        Args:
            place: the weight.
            index: of the matrix in a stack.

        Raises:
            AdapterError: the base's weights are there, but cannot be read.
        """
        tensor = self.weight(place)
        return None if tensor is None else norm_of(tensor, index)

    def weight(self, place: Place) -> Tensor | None:
        """A weight of the base, as stored; None where the base's weights are not at hand.

        None too for a weight that the base does not have under the adapters' name for it, in the shape that they
        expect and in floating point, as those of a quantized model.

        Raises:
            AdapterError: the base's weights are there, but cannot be read.
        """
        if self._loader is None or place.weight not in self._loader.index.tensor_paths:
            return None
        try:
            tensor = self._loader.get_tensor(place.weight)
        except READING as error:
            raise self._unreadable(error) from error
        fits = tensor is not None and tuple(tensor.shape) == place.stored_shape and tensor.is_floating_point()
        return tensor if fits else None

    @property
    def known(self) -> bool:
        """Whether the base's weights are at hand."""
        return self._loader is not None

    @cached_property
    def depth(self) -> int | None:
        """How many blocks the base has, one after another; None where its weights are not at hand, or do not tell."""
        return None if self._at is None else depth_of([ModelReference.model_validate(str(self._at))])

    @cached_property
    def _at(self) -> Path | None:
        return None if self._base is None else _folder(self._base)

    @cached_property
    def _loader(self) -> LazyTensorLoader | None:
        if self._at is None:
            return None
        try:
            return LazyTensorLoader.from_disk(str(self._at))
        except READING as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> AdapterError:
        return AdapterError(
            f"the weights of the base model {self._base} must be readable for their norms; {message_of(error)}. "
            "Repair the model, or take its weights away: updates then count as small for them"
        )


def _folder(base: str) -> Path | None:
    """Where the base's weights lie on this disk; None where they do not."""
    if Path(base).is_dir():
        return Path(base) if any((Path(base) / name).is_file() for name in _FILES) else None
    try:
        found = [file for name in _FILES if isinstance(file := try_to_load_from_cache(base, name), str)]
    except HFValidationError:  # no name that a hub knows
        return None
    if not found:
        return None
    folder = Path(found[0]).parent
    shards = ShardedTensorIndex.from_disk(str(folder)).shards
    return folder if all((folder / shard.filename).is_file() for shard in shards) else None
