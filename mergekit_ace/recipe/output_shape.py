"""Shape and dtype of a merged tensor, from the headers of what is merged."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from mergekit.common import ModelReference, dtype_from_name
from mergekit.merge_methods import MergeMethod
from mergekit.merge_methods.base import OptionalTensorPolicy

from mergekit_ace.checkpoints.headers import TensorHeader, find_header
from mergekit_ace.mergekit_internals import (
    ExecuteMergeMethodTask,
    GatherTensors,
    LoadTensor,
    PermutedVocabulary,
    SaveTensor,
    TokenizerInfo,
    TruncatedVocabulary,
    convert_checkpoint_tensors,
)

if TYPE_CHECKING:
    from mergekit_ace.recipe.plan import Plan


def output_header(save: SaveTensor, plan: Plan) -> TensorHeader | None:
    """What mergekit will save: the inputs' common shape, their promoted dtype unless the recipe names another.

    Returns:
        None where nothing is saved: no model has the tensor, or fewer than the method needs of an optional one.

    Raises:
        OSError, RuntimeError: a checkpoint's header cannot be read.
    """
    task = cast(ExecuteMergeMethodTask, save.tensor_task)
    inputs = task.gather_tensors
    gather = inputs if isinstance(inputs, GatherTensors) else cast(GatherTensors, _gather(inputs))
    loads = [cast(LoadTensor, load) for load in gather.arguments().values()]
    headers = {load.model: header for load in loads if (header := as_loaded(load, plan)) is not None}
    present = [model for model in task.model_order if model in headers]
    if not present or _is_skipped(task, present, plan.method):
        return None
    dtype = functools.reduce(torch.promote_types, (headers[model].dtype for model in present))
    model = task.base_model if task.base_model in headers else present[0]
    shape = list(headers[model].shape)
    axis = task.output_weight.vocabulary_axis
    if isinstance(inputs, PermutedVocabulary):
        shape[inputs.vocabulary_axis] = _padded(plan.evaluate(inputs.tokenizer_task), inputs.pad_to_multiple_of)
    elif isinstance(inputs, TruncatedVocabulary) and axis is not None:
        shape[axis] = min(headers[model].shape[axis] for model in present)
    return TensorHeader(shape=tuple(shape), dtype=dtype_from_name(save.dtype) or dtype)


def _gather(inputs: object) -> object:
    return inputs.gather_tensors if isinstance(inputs, PermutedVocabulary | TruncatedVocabulary) else None


def _is_skipped(task: ExecuteMergeMethodTask, present: Sequence[ModelReference], method: MergeMethod) -> bool:
    spec = method.spec
    return (
        task.output_weight.optional
        and len(present) < len(task.model_order)
        and spec.optional_tensor_policy == OptionalTensorPolicy.BASE_OR_SKIP
        and len(present) < spec.contract.min_inputs
        and list(present) != [task.base_model]
    )


def _padded(tokenizer: TokenizerInfo, multiple: int | None) -> int:
    rows = len(tokenizer.tokenizer.get_vocab())
    return rows if not multiple else -(-rows // multiple) * multiple


def as_loaded(load: LoadTensor, plan: Plan) -> TensorHeader | None:
    """Shape and dtype of what mergekit reads of one model, converted where it is stored in another layout."""
    headers = plan.headers(load.model)
    header = find_header(headers, load.tensor, load.aliases, load.tied_names)
    if header is None:
        # Stored in another layout than transformers loads, such as one tensor an expert of a mixture.
        sources = {name: functools.partial(_empty, stored) for name, stored in headers.items()}
        model_type = plan.model_type(load.model)
        for name in (load.tensor, *(load.aliases or ())):
            converted = convert_checkpoint_tensors(model_type, sources, name)
            if converted is not None:
                header = TensorHeader(shape=tuple(converted.shape), dtype=converted.dtype)
                break
        else:
            return None
    return TensorHeader(shape=header.shape, dtype=dtype_from_name(load.dtype) or header.dtype)


def _empty(header: TensorHeader) -> torch.Tensor:
    return torch.empty(header.shape, dtype=header.dtype, device="meta")
