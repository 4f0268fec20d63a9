"""What a merge would do, without doing it."""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_ace.engine.merging import Request
from mergekit_ace.engine.part import Part
from mergekit_ace.engine.plan import plan_merge
from mergekit_ace.engine.shards import Shard, of_part
from mergekit_ace.recipe.plan import planned
from mergekit_ace.recipe.tensor_cost import PYTHON, tensor_cost


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """All in bytes."""

    shards: tuple[Shard, ...]
    read: int
    written: int
    memory: int
    """A worker's: the largest tensor, the next one's inputs, the last one's output, Python; of pickles a whole file."""
    least_memory: int
    """The same without the next one's inputs, which `--memory` can keep from being read ahead."""
    part: Part | None


def dry_run(request: Request) -> DryRun:
    """Plan a merge from headers; merges no adapter and writes nothing.

    Raises:
        RecipeError, ValueError, OSError: as planning the merge.
    """
    with planned(request.recipe, request.options, adapters_unmerged=True) as plan:
        work = plan_merge(plan, request.options, shard_size=request.shard_size, patterns=request.patterns)
        shards = work.shards if request.part is None else tuple(of_part(work.shards, request.part))
        made = {tensor.name for shard in shards for tensor in shard.tensors}
        costs = [tensor_cost(plan, tensor, tensor.output) for tensor in plan.tensors if tensor.name in made]
    largest = max((cost.inputs + cost.workspace for cost in costs), default=0)
    ahead = max((cost.inputs for cost in costs), default=0)
    tensors_written = (cost.written for cost in costs)
    held = tensors_written if request.options.safe_serialization else (shard.nbytes for shard in shards)
    one = largest + max(held, default=0) + PYTHON
    return DryRun(
        shards=shards,
        read=sum(cost.read for cost in costs),
        written=sum(shard.nbytes for shard in shards),
        memory=one + ahead,
        least_memory=one,
        part=request.part,
    )
