"""Moments of a folder, read one tensor at a time and only for the weights that they were measured on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mergekit_ace.matrix.expert import MeasuredMoment
from mergekit_ace.moments.fingerprint import fingerprint
from mergekit_ace.moments.index import INDEX, MeasuredExpert, MeasuredTensor, MomentsError, MomentsIndex, read_index


class MomentsFolder:
    """A moments folder.

    Args:
        folder: as `mergekit-ace moments` wrote it.

    Raises:
        MomentsError: it is none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index: MomentsIndex = read_index(folder)

    def names(self, models: Iterable[str]) -> dict[str, str | None]:
        """The name in this folder of each expert of a recipe; None where it has no moments.

        By the whole reference or the adapter's own path; else by the last part of it, so that models may be moved,
        where no other expert of the recipe has the same moments.

        Args:
            models: all experts of the recipe, as it names them.
        """
        listed = list(dict.fromkeys(models))
        exact = {model: self._named(model, whole=True) for model in listed}
        others = {model: self._named(model, whole=False) for model in listed if exact[model] is None}
        claimed = Counter(name for name in (*exact.values(), *others.values()) if name is not None)
        return {
            model: exact[model] or (found if (found := others[model]) is not None and claimed[found] == 1 else None)
            for model in listed
        }

    def _named(self, model: str, *, whole: bool) -> str | None:
        """The one expert of the folder that has a model's name, or the last part of it."""
        found = []
        for name, entry in self.index.experts.items():
            if whole and model in (name, entry.model, entry.model.rpartition("+")[2]):
                found.append(name)
            if not whole and last_part(model) in (name, last_part(entry.model)):
                found.append(name)
        return found[0] if len(found) == 1 else None

    def tensor(self, name: str, shape: Sequence[int], *, input_first: bool) -> MeasuredTensor | None:
        """What was measured of a tensor of the merged model; None where nothing was.

        Args:
            name: of the tensor.
            shape: of the base's weight, as stored.
            input_first: how it is stored, by the recipe.

        Raises:
            MomentsError: it was measured on a weight of another shape, or along the other axis.
        """
        measured = self.index.tensors.get(name)
        if measured is None:
            return None
        if measured.base.shape != tuple(shape):
            raise MomentsError(
                f"{name} must have the shape that the moments in {self.folder} were measured on, "
                f"{measured.base.shape}; got {tuple(shape)}. Measure them on the models of this recipe"
            )
        if measured.input_first != input_first:
            stored, said = ("first", "last") if measured.input_first else ("last", "first")
            raise MomentsError(
                f"{name}: its inputs were measured along the {stored} axis; the recipe has input_axis: {said}. "
                f"Set input_axis: {stored} for it"
            )
        return measured

    def require_weight(self, name: str, weight: Tensor, *, expert: str | None = None) -> None:
        """Refuse a weight that the moments were not measured on.

        Args:
            name: of a tensor that `tensor` found.
            weight: as stored.
            expert: whose it is, as `names` gave; its values count where it was itself run. None: the base's.

        Raises:
            MomentsError: it has other values.
        """
        if expert is None:
            model, what, measured = f"the base {self.index.base}", "the base", self.index.tensors[name].base
        elif name in self.index.experts[expert].weights:
            entry = self.index.experts[expert]
            model, what, measured = entry.model, f"the expert {expert}", entry.weights[name]
        else:
            return
        if not measured.matches(fingerprint(weight)):
            raise MomentsError(
                f"{name} of {what} is not the weight that the moments in {self.folder} were measured on ({model}): it "
                "has other values. Measure them on the models of this recipe"
            )

    def measured(self, tensor: MeasuredTensor, expert: str) -> MeasuredMoment | None:
        """An expert's moment; None where too few of its tokens came to this matrix.

        Args:
            tensor: what `tensor` gave.
            expert: what `names` gave.

        Raises:
            MomentsError: the file is damaged.
        """
        entry = self.index.experts[expert]
        if tensor.input not in entry.inputs:
            return None
        found = entry.inputs[tensor.input]
        return MeasuredMoment(factor=self._read(entry, tensor), error=found.error, tokens=found.tokens)

    def _read(self, entry: MeasuredExpert, tensor: MeasuredTensor) -> Tensor:
        file = self.folder / entry.file
        try:
            with safe_open(file, framework="pt") as stored:
                factor: Tensor = stored.get_tensor(tensor.input)
        except (OSError, SafetensorError) as error:
            raise MomentsError(f"{file}: the moments cannot be read; {error}. Measure them again") from error
        inputs = tensor.base.shape[0 if tensor.input_first else 1]
        if factor.ndim != 2 or factor.shape[1] != inputs:
            raise MomentsError(
                f"{file}: the moments of {tensor.input} must have {inputs} columns; got shape {tuple(factor.shape)}"
            )
        if not bool(torch.isfinite(factor).all()):
            raise MomentsError(f"{file}: the moments of {tensor.input} hold NaN or infinity. Measure them again")
        return factor


def last_part(model: str) -> str:
    """The last part of a model's path, or of its adapter's."""
    return model.rpartition("+")[2].rstrip("/").rpartition("/")[2]


def open_moments(folder: Path) -> MomentsFolder:
    """A moments folder, its index parsed once for as long as it stays the same.

    Raises:
        MomentsError: it is none.
    """
    try:
        changed = (folder / INDEX).stat().st_mtime_ns
    except OSError:
        changed = 0  # what is wrong is reported where it is read
    return _open(folder.resolve(), changed)


@lru_cache(maxsize=4)
def _open(folder: Path, changed: int) -> MomentsFolder:
    return MomentsFolder(folder)
