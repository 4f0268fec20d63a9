"""A merge as another process gets it: names and numbers, no tensors."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from mergekit.options import MergeOptions
from pydantic import BaseModel

import mergekit_ace
from mergekit_ace.engine.plan import MergePlan
from mergekit_ace.engine.shard_maker import OnTensor, ShardMaker
from mergekit_ace.recipe.planning import planned
from mergekit_ace.recipe.reading import parse_recipe


class Job(BaseModel, frozen=True, extra="forbid"):
    """What a worker needs to make shards of a merge."""

    recipe: str
    """The recipe's text."""
    name: str
    """How messages call the recipe."""
    options: dict[str, Any]
    """mergekit's."""
    plan: MergePlan
    folder: str
    """Where the shards go."""
    receipts: str
    """Where their receipts go."""
    directory: str
    """Relative paths of the recipe start here."""
    places: dict[str, str]
    """Absolute paths of the plan's inputs."""
    memory: int | None
    """Bytes that each worker may use; no bound if None."""


@contextlib.contextmanager
def opened(job: Job, device: str | None, on_tensor: OnTensor) -> Iterator[ShardMaker]:
    """A maker of a job's shards, in a process of its own.

    Args:
        job: the merge.
        device: where to merge, such as `cuda:1`; that of the options if None.
        on_tensor: as in `ShardMaker`.

    Raises:
        RuntimeError: this process has other versions than planned the merge.
        RecipeError: as `planned`.
    """
    _require_versions(job.plan)
    os.chdir(job.directory)
    mergekit_ace.register()
    options = MergeOptions(**{**job.options, **({"device": device} if device else {})})
    if device is not None and device.startswith("cuda"):
        torch.cuda.set_device(device)
    with planned(parse_recipe(job.recipe, Path(job.name)), options) as plan:
        folders = Path(job.folder), Path(job.receipts)
        with ShardMaker(plan, job.plan, *folders, memory=job.memory, on_tensor=on_tensor) as maker:
            yield maker


def _require_versions(plan: MergePlan) -> None:
    here = {
        "mergekit": version("mergekit"),
        "mergekit_ace": mergekit_ace.__version__,
        "torch": torch.__version__,
    }
    for name, actual in here.items():
        if (expected := getattr(plan.merge, name)) != actual:
            raise RuntimeError(f"every worker must have {name} {expected} as the driver has; got {actual}")
