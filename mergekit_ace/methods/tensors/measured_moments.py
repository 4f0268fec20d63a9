"""The experts of a tensor with the second moments of their inputs that a recipe's `moments` folder holds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mergekit_ace.matrix.expert import Expert, MeasuredMoment
from mergekit_ace.moments.index import MeasuredTensor, MomentsError
from mergekit_ace.moments.load import MomentsFolder, open_moments

LOG = logging.getLogger("mergekit_ace")

Warn = Callable[[str, str], None]


def with_measured_moments(
    name: str, base: Tensor, experts: Sequence[Expert], parameters: Mapping[str, Any], warn: Warn
) -> tuple[Expert, ...]:
    """The same experts, each with its measured second moment where the folder has one.

    Args:
        name: of the tensor, a single matrix.
        base: as stored.
        experts: as stored.
        parameters: of the recipe; `moments` is the folder, empty for none.
        warn: told once that some experts keep their estimates.

    Raises:
        MomentsError: the folder is none, or was measured on other models, or has moments of none of the experts.
    """
    if not parameters.get("moments"):
        return tuple(experts)
    found = _found(name, base.shape, {expert.name: expert.weight > 0 for expert in experts}, parameters, warn)
    if found is None:
        return tuple(experts)
    folder = found.folder
    folder.require_weight(name, base)
    result = []
    for expert in experts:
        measured = None
        if (known_as := found.names[expert.name]) is not None:
            folder.require_weight(name, expert.tensor, expert=known_as)
            measured = folder.measured(found.tensor, known_as)
        result.append(replace(expert, measured=measured))
    return tuple(result)


@dataclass(frozen=True, kw_only=True)
class FoundMoments:
    """What a folder has of one weight, before any moment is read.

    Attributes:
        folder: of the recipe.
        tensor: the weight, as it was measured.
        names: expert of the recipe -> its name in the folder; None where it was not measured.
    """

    folder: MomentsFolder
    tensor: MeasuredTensor
    names: Mapping[str, str | None]

    def read(self, experts: Iterable[str]) -> dict[str, MeasuredMoment | None] | None:
        """The moments of some experts; None where none of theirs is measured.

        Raises:
            MomentsError: a file is damaged.
        """
        known = {expert: self.names[expert] for expert in experts}
        moments = {e: None if name is None else self.folder.measured(self.tensor, name) for e, name in known.items()}
        return moments if any(moment is not None for moment in moments.values()) else None


def moments_for_adapters(
    name: str,
    shape: Sequence[int],
    adapters: Mapping[str, bool],
    parameters: Mapping[str, Any],
    warn: Warn,
    *,
    base: Tensor | None = None,
) -> FoundMoments | None:
    """What is measured of the inputs of one weight that adapters change; None where nothing is.

    Args:
        name: of the weight.
        shape: of the base's weight, as stored.
        adapters: of the recipe, by name or path -> whether it changes the weight.
        parameters: of the recipe.
        warn: as of `with_measured_moments`.
        base: the base's weight, where it is at hand: it must be the one that the moments were measured on.

    Raises:
        MomentsError: as `with_measured_moments`; or the moments were measured by the experts themselves.
    """
    if not parameters.get("moments"):
        return None
    found = _found(name, shape, adapters, parameters, warn)
    if found is None:
        return None
    folder = found.folder
    if folder.index.by == "expert":
        raise MomentsError(
            f"{folder.folder} was measured by the experts themselves (--by expert), which cannot be told from others "
            "by their factors. Measure the moments by the base, or merge without --adapter"
        )
    if base is not None:
        folder.require_weight(name, base)
    return found


def measured_inputs(name: str, parameters: Mapping[str, Any]) -> int:
    """The most inputs that a tensor's second moments are the mean of; 0 where none is measured.

    Args:
        name: of the tensor.
        parameters: of the recipe.

    Raises:
        MomentsError: the folder is none.
    """
    if not parameters.get("moments"):
        return 0
    index = open_moments(Path(parameters["moments"])).index
    if name not in index.tensors:
        return 0
    source = index.tensors[name].input
    return max((entry.inputs[source].tokens for entry in index.experts.values() if source in entry.inputs), default=0)


def _found(
    name: str, shape: Sequence[int], experts: Mapping[str, bool], parameters: Mapping[str, Any], warn: Warn
) -> FoundMoments | None:
    """What the recipe's folder has of a tensor; None where it has nothing of it.

    Args:
        name: of the tensor.
        shape: as stored.
        experts: name -> whether it has a part in the merge.
        parameters: of the recipe.
        warn: told once of each expert that keeps its estimates.
    """
    folder = open_moments(Path(parameters["moments"]))
    known = folder.names(experts)
    if not any(known.values()):
        raise MomentsError(
            f"{folder.folder} has second moments of {', '.join(folder.index.experts)}, none of which is an expert of "
            f"this recipe: {', '.join(experts)}. Measure them on the models of this recipe, or remove moments"
        )
    for expert, takes_part in experts.items():
        if known[expert] is None and takes_part:
            warn(
                f"moments of {expert}",
                f"{folder.folder} has no second moments of {expert}, which keeps the estimate from its task vector; it "
                f"has those of {', '.join(folder.index.experts)}.",
            )
    tensor = folder.tensor(name, shape, input_first=parameters["input_axis"] == "first")
    if tensor is None:
        LOG.info("%s: no measured second moments, estimated from the task vectors", name)
        return None
    return FoundMoments(folder=folder, tensor=tensor, names=known)
