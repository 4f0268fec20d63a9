"""What a merge would do, without doing it."""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_ace.checkpoints.hub import hub_model
from mergekit_ace.checkpoints.sources import is_on_hub
from mergekit_ace.engine.driver import Request
from mergekit_ace.engine.part import Part
from mergekit_ace.engine.plan import plan_shards
from mergekit_ace.engine.shards import Shard, of_part
from mergekit_ace.mergekit_internals import in_recipe_order
from mergekit_ace.recipe.planning import planned
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
    """Plan a merge from headers; merges no adapter, downloads no weights and writes nothing.

    Raises:
        ValueError: a model of the Hugging Face Hub that has pickles only, whose headers cannot be read alone.
        RecipeError, ValueError, OSError: as planning the merge.
    """
    on_hub = [model.model for model in in_recipe_order(request.recipe.config) if is_on_hub(model.model)]
    for source in on_hub:
        if hub_model(source).state == "no safetensors":
            raise ValueError(
                f"{request.recipe.name}: a dry run downloads no weights; {source} has no safetensors files on the "
                f"Hugging Face Hub, whose headers could be read. Run: hf download {source.path}, and write the folder "
                "that it prints"
            )
    # Without a network mergekit plans from what was downloaded before.
    headers_only = all(hub_model(source).state == "read" for source in on_hub)
    with planned(request.recipe, request.options, adapters_unmerged=True, headers_only=headers_only) as plan:
        # The files of models on the hub are not on this disk: they have no fingerprints.
        _, shards = plan_shards(plan, request.options, shard_size=request.shard_size, patterns=request.patterns)
        if request.part is not None:
            shards = tuple(of_part(shards, request.part))
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
