"""Tensors that mergekit hands over a second time without all of their models."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence

from mergekit.common import ModelReference

from mergekit_ace.printable import printable


class KnownInputs:
    """The models of every tensor that a merge has merged; thread-safe, one for each merge method.

    mergekit 0.1.5 collects the results of `--multi-gpu` in a thread that it stops once the last device is done, whether
    or not its queue is empty. What was left there is made again after the devices, from inputs of which it has kept
    None. Of a tensor whose inputs were left there in part, some models are then missing, and the others would be merged
    as if they were all.
    """

    def __init__(self) -> None:
        self._models: dict[str, frozenset[ModelReference]] = {}
        self._lock = threading.Lock()

    def begin(self) -> None:
        """A merge begins."""
        with self._lock:
            self._models.clear()

    def merging(self, tensor: str | None, inputs: Sequence[Hashable]) -> None:
        """A tensor is about to be merged from these models."""
        if tensor is not None:
            with self._lock:
                self._models[tensor] = _models(inputs)

    def require(self, tensor: str | None, inputs: Sequence[Hashable]) -> None:
        """Hold a tensor's models against those that it was merged from before, if this merge has merged it before.

        Raises:
            RuntimeError: some are missing; with the tensor, the models and the remedy.
        """
        given = _models(inputs)
        if tensor is None or not given:  # merged from Python, by keys of its own
            return
        with self._lock:
            lost = self._models.get(tensor, frozenset()) - given
        if lost:
            names = ", ".join(sorted(printable(str(model)) for model in lost))
            raise RuntimeError(
                f"{printable(tensor)}: mergekit must hand over the models that it handed over before; now {names} "
                "is missing. mergekit's --multi-gpu lost results that were in its queue when the last device was done. "
                "Start the merge again, or run mergekit-ace merge --multi-gpu, which does not use that queue"
            )


def _models(inputs: Sequence[Hashable]) -> frozenset[ModelReference]:
    """Those of a recipe; what is merged from Python goes by other keys."""
    return frozenset(model for model in inputs if isinstance(model, ModelReference))
