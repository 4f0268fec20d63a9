"""The experts of a tensor with the second moments of their inputs that a recipe's `moments` folder holds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mergekit_ace.matrix.expert import Expert
from mergekit_ace.moments.index import MomentsError
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
    folder = open_moments(Path(parameters["moments"]))
    measured_as = {expert.name: folder.expert(expert.name) for expert in experts}
    _require_some(folder, measured_as)
    tensor = folder.tensor(name, base, input_first=parameters["input_axis"] == "first")
    if tensor is None:
        LOG.info("%s: no measured second moments, estimated from the task vectors", name)
        return tuple(experts)
    result = []
    for expert in experts:
        known_as = measured_as[expert.name]
        measured = None
        if known_as is not None:
            measured = folder.measured(name, tensor, known_as, expert.tensor)
        if known_as is None and expert.weight > 0:
            warn(
                f"moments of {expert.name}",
                f"{folder.folder} has no second moments of {expert.name}, which keeps the estimate from its task "
                f"vector; it has those of {', '.join(folder.index.experts)}",
            )
        result.append(replace(expert, measured=measured))
    return tuple(result)


def _require_some(folder: MomentsFolder, measured_as: Mapping[str, str | None]) -> None:
    if not any(measured_as.values()):
        raise MomentsError(
            f"{folder.folder} has second moments of {', '.join(folder.index.experts)}, none of which is an expert of "
            f"this recipe: {', '.join(measured_as)}. Measure them on the models of this recipe, or remove moments"
        )
