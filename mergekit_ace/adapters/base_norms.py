"""Norms of the base's weights: how large an update is for its weight, which adapters alone do not tell."""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path

from mergekit.io import LazyTensorLoader

from mergekit_ace.factors.model import Place
from mergekit_ace.factors.tensors import AdapterError
from mergekit_ace.linalg.precision import squared_norm
from mergekit_ace.unreadable import READING, message_of

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


class BaseNorms:
    """Reads a weight of the base when its norm is asked for, and keeps nothing.

    Args:
        base: the base model's folder, or its name on a hub, which is not fetched.
    """

    def __init__(self, base: str | None) -> None:
        self._base = base

    def of(self, place: Place, index: int | None = None) -> float | None:
        """`||W_0||_F` of a weight, or of one matrix of a stack; None where the base's weights are not at hand.

        None too for a weight that the base does not have under the adapters' name for it, in the shape that they
        expect and in floating point, as those of a quantized model.

        Args:
            place: the weight.
            index: of the matrix in a stack.

        Raises:
            AdapterError: the base's weights are there, but cannot be read.
        """
        if self._loader is None or place.weight not in self._loader.index.tensor_paths:
            return None
        try:
            tensor = self._loader.get_tensor(place.weight)
        except READING as error:
            raise self._unreadable(error) from error
        if tensor is None or tuple(tensor.shape) != place.stored_shape or not tensor.is_floating_point():
            return None
        return math.sqrt(squared_norm(tensor if index is None else tensor[index]))

    @cached_property
    def _loader(self) -> LazyTensorLoader | None:
        if self._base is None:
            return None
        folder = Path(self._base)
        if not any((folder / f"{name}{end}").is_file() for name in _WEIGHTS for end in ("", ".index.json")):
            return None
        try:
            return LazyTensorLoader.from_disk(str(folder))
        except READING as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> AdapterError:
        return AdapterError(
            f"the weights of the base model {self._base} must be readable for their norms; {message_of(error)}. "
            "Repair the model, or take its weights away: updates then count as small for them"
        )
