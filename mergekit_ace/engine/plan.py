"""A merge planned once: what identifies it, the files of its output, and the versions of what it reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from mergekit.common import ModelReference
from mergekit.options import MergeOptions
from pydantic import BaseModel

import mergekit_ace
from mergekit_ace.checkpoints.fingerprint import Fingerprint, describing_files, fingerprint
from mergekit_ace.checkpoints.headers import TensorHeader
from mergekit_ace.checks.preflight import require_sound_plan
from mergekit_ace.engine.cost import seconds
from mergekit_ace.engine.shards import OutputTensor, Shard, default_shard_size, file_names, grouped
from mergekit_ace.recipe.patterns import select_names
from mergekit_ace.recipe.plan import Plan, PlannedTensor
from mergekit_ace.recipe.tensor_cost import tensor_cost
from mergekit_ace.recipe.treatments import treated

# mergekit's options that change the output's values or names.
_TELLING_OPTIONS = (
    "allow_crimes",
    "lora_merge_dtype",
    "random_seed",
    "safe_serialization",
    "unsafe_truncate_embeddings",
)


class Merge(BaseModel, frozen=True, extra="forbid"):
    """What tells one merge from another, however it is divided."""

    recipe: str
    """SHA-256 of the recipe's content and of the options that bear on it."""
    plan: tuple[OutputTensor, ...]
    """The output's tensors in the order of the files."""
    shard_size: int
    """Bytes in an output file."""
    tokenizer: str
    """SHA-256 of the vocabulary that the recipe's `tokenizer` makes; empty where it has none."""
    mergekit: str
    mergekit_ace: str
    torch: str

    @property
    def digest(self) -> str:
        """SHA-256 of all of it."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


class MergePlan(BaseModel, frozen=True, extra="forbid"):
    """A merge, ready to be made."""

    format: Literal[1] = 1
    merge: Merge
    shards: tuple[Shard, ...]
    inputs: dict[str, Fingerprint]
    """Every file that is read, by `MODEL/FILE`: weights, configurations, tokenizers; second moments by their path."""

    def key(self, shard: Shard) -> str:
        """Tells two versions of a shard apart, other than by the weights that it is made from."""
        small = {name: self.inputs[name].digest for name in sorted(self.inputs) if name not in self._weights}
        content = {"merge": self.merge.digest, "shard": shard.model_dump(exclude={"costs"}), "inputs": small}
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()

    @property
    def _weights(self) -> frozenset[str]:
        return frozenset(name for shard in self.shards for name in shard.reads)

    def sources(self, shard: Shard) -> dict[str, Fingerprint]:
        """The weights that a shard is made from."""
        return {name: self.inputs[name] for name in shard.reads}


def plan_merge(
    plan: Plan, options: MergeOptions, *, shard_size: int | None = None, patterns: Sequence[str] = ()
) -> MergePlan:
    """What `plan_shards` plans, with the fingerprints of the files that it is made of.

    Raises:
        ValueError, RecipeError, OSError: as `plan_shards`.
    """
    merge, shards = plan_shards(plan, options, shard_size=shard_size, patterns=patterns)
    return MergePlan(merge=merge, shards=shards, inputs=read_inputs(plan))


def plan_shards(
    plan: Plan, options: MergeOptions, *, shard_size: int | None = None, patterns: Sequence[str] = ()
) -> tuple[Merge, tuple[Shard, ...]]:
    """Group the output's tensors into files, in the order in which mergekit writes them.

    Args:
        plan: the recipe's.
        options: of `mergekit-yaml`.
        shard_size: bytes in a file; chosen by the size of the model if None.
        patterns: names of the tensors to make, as glob patterns; all if empty. The files are planned for all of them.

    Raises:
        ValueError: a pattern matches no tensor.
        RecipeError: a model lacks a tensor that it must have, or has it in another shape; no expert has a weight.
        OSError: an input cannot be read.
    """
    require_sound_plan(plan)
    planned = [tensor for tensor in plan.execution_order if tensor.output is not None]
    outputs = {tensor.name: _described(tensor) for tensor in planned}
    total = sum(output.nbytes for output in outputs.values())
    merge = Merge(
        recipe=_recipe_digest(plan, options),
        plan=tuple(outputs.values()),
        shard_size=default_shard_size(total) if shard_size is None else shard_size,
        tokenizer=_tokenizer_digest(plan),
        mergekit=version("mergekit"),
        mergekit_ace=mergekit_ace.__version__,
        torch=torch.__version__,
    )
    by_name = {tensor.name: tensor for tensor in planned}
    groups = grouped(merge.plan, merge.shard_size)
    names = file_names(len(groups), safetensors=options.safe_serialization)
    chosen = select_names([output.name for output in merge.plan], patterns)
    shards = []
    for name, group in zip(names, groups, strict=True):
        tensors = tuple(output for output in group if output.name in chosen)
        if tensors:
            files = {_key(model, file) for output in tensors for model, file in by_name[output.name].files}
            inputs = [by_name[output.name] for output in tensors]
            costs = tuple(seconds(tensor_cost(plan, tensor, tensor.output)) for tensor in inputs)
            shards.append(Shard(file=name, tensors=tensors, costs=costs, reads=tuple(sorted(files))))
    return merge, tuple(shards)


def read_inputs(plan: Plan) -> dict[str, Fingerprint]:
    """Fingerprints of every file that the merge reads, by `MODEL/FILE`."""
    files = input_files(plan)
    return {key: fingerprint(files[key]) for key in sorted(files)}


def input_files(plan: Plan) -> dict[str, Path]:
    """Every file that the merge reads, by `MODEL/FILE`, and the recipe's `moments` folders, by their path."""
    files: dict[str, Path] = {}
    for model in plan.models:
        folder = plan.folder(model)
        weights = {file for tensor in plan.tensors if tensor.reads(model) for at, file in tensor.files if at == model}
        files |= {_key(model, name): folder / name for name in weights}
        files |= {_key(model, file.name): file for file in describing_files(folder)}
    for moments in {str(tensor.shared_parameters.get("moments") or "") for tensor in plan.tensors} - {""}:
        files |= {str(file): file for file in Path(moments).glob("*") if file.is_file()}
    return files


def treatments(plan: Plan) -> Mapping[str, int]:
    """How many tensors are merged in which way; empty for a method that is not ours."""
    from mergekit_ace.methods.layerwise import LayerwiseMethod

    counts: dict[str, int] = {}
    if isinstance(plan.method, LayerwiseMethod):
        for tensor in plan.tensors:
            if tensor.output is not None:
                kind = treated(plan.method, tensor, tensor.output.shape).kind
                counts[kind] = counts.get(kind, 0) + 1
    return counts


def _key(model: ModelReference, file: str) -> str:
    return f"{model}/{file}"


def _described(tensor: PlannedTensor) -> OutputTensor:
    header = tensor.output
    assert isinstance(header, TensorHeader)
    return OutputTensor(name=tensor.name, dtype=str(header.dtype).removeprefix("torch."), shape=header.shape)


def _recipe_digest(plan: Plan, options: MergeOptions) -> str:
    content: dict[str, Any] = {
        # As it is written: pydantic cannot dump a model that mergekit has no string for, such as a folder with a +.
        "recipe": plan.recipe.document,
        "options": {name: getattr(options, name) for name in _TELLING_OPTIONS},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _tokenizer_digest(plan: Plan) -> str:
    if plan.tokenizer is None:
        return ""
    vocabulary = sorted(plan.tokenizer.tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()
