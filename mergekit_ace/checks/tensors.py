"""The planned tensors by their headers: missing ones, shapes and dtypes that do not fit, treatments that look wrong."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from mergekit.common import ModelReference, dtype_from_name

from mergekit_ace.checkpoints.headers import unlisted_tensors
from mergekit_ace.checks.prefixes import renamed_remedy
from mergekit_ace.methods.advice import table_merged_as_matrix
from mergekit_ace.methods.layerwise import LayerwiseMethod
from mergekit_ace.recipe.failures import READING
from mergekit_ace.recipe.findings import Finding
from mergekit_ace.recipe.plan import Plan, PlannedTensor
from mergekit_ace.recipe.treatments import treated
from mergekit_ace.tensor_treatment import is_embedding

_CONV1D_FAMILIES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D = re.compile(r"\.(?:c_attn|q_attn|c_proj|c_fc)\.weight$")
_MOST_NAMES = 3


def check_tensors(plan: Plan) -> Iterator[Finding]:
    """Tensors that a model does not have, or has in another shape than the base."""
    yield from check_missing(plan)
    misshapen: dict[ModelReference, list[str]] = defaultdict(list)
    vocabulary: dict[ModelReference, list[str]] = defaultdict(list)
    aligned = plan.recipe.config.tokenizer is not None or plan.recipe.config.tokenizer_source is not None
    for tensor in plan.tensors:
        base = tensor.loaded(tensor.base) if tensor.base and tensor.reads(tensor.base) else None
        for model in (*([tensor.base] if tensor.base and tensor.reads(tensor.base) else []), *tensor.experts):
            header = tensor.loaded(model)
            if header is None or base is None or header.shape == base.shape:
                continue
            if tensor.vocabulary_axis is None:
                misshapen[model].append(f"{tensor.name} {header.shape} for {base.shape}")
            elif not aligned and not plan.options.unsafe_truncate_embeddings:
                vocabulary[model].append(f"{tensor.name} {header.shape} for {base.shape}")
    for model, names in misshapen.items():
        yield Finding(
            level="error",
            what=f"{model} has shapes other than the base's: {_some(names)}",
            remedy="Merge fine-tunes of one base model.",
        )
    for model, names in vocabulary.items():
        yield Finding(
            level="error",
            what=f"{model} has a vocabulary of another size than the base: {_some(names)}",
            remedy="Align them: tokenizer: {source: base}, or {source: union} to keep every token.",
        )


def check_missing(plan: Plan) -> Iterator[Finding]:
    """Tensors of the architecture that a model does not have, or has under a longer name."""
    missing = dict(missing_tensors(plan))
    renamed = {model: renamed_remedy(names, plan.headers(model)) for model, names in missing.items()}
    nobody_has = _in_all(list(missing.values())) if len(missing) == len(plan.models) > 1 else []
    if nobody_has and not any(renamed.values()):
        yield Finding(
            level="error",
            what=f"mergekit's definition of the architecture asks for {_some(nobody_has)}, which no model has",
            remedy="It does not fit these models: merge their files with mergekit-pytorch, which takes every tensor.",
        )
    for model, names in missing.items():
        why, remedy = renamed[model] or _unlisted(model, names) or ("", "Complete the checkpoint.")
        own = [name for name in names if renamed[model] or name not in set(nobody_has)]
        if own:
            what = f"{model} lacks {_some(own)}" + (f": {why}" if why else "")
            yield Finding(level="error", what=what, remedy=remedy)


def _unlisted(model: ModelReference, names: Sequence[str]) -> tuple[str, str] | None:
    """Why tensors are missing, and the remedy, where the files hold them and the index does not list them."""
    try:
        files = unlisted_tensors(Path(model.model.path))
    except READING:  # reported by the checks of files
        return None
    if not all(name in files for name in names):
        return None
    return (
        f"{files[names[0]]} holds them, and the index does not list them",
        "The index belongs to other files: download or copy it again, or load the model with transformers and save it.",
    )


def _in_all(lists: Sequence[Sequence[str]]) -> Sequence[str]:
    return [name for name in lists[0] if all(name in set(names) for names in lists[1:])]


def check_names(plan: Plan) -> Iterator[Finding]:
    """Models that have their tensors under longer names."""
    for model, names in missing_tensors(plan):
        if renamed := renamed_remedy(names, plan.headers(model)):
            yield Finding(level="error", what=f"{model} lacks {_some(names)}: {renamed[0]}", remedy=renamed[1])


def missing_tensors(plan: Plan) -> Iterator[tuple[ModelReference, Sequence[str]]]:
    """The models that lack tensors, and the names under which mergekit looks for them."""
    for model in plan.models:
        names = [
            tensor.input_name(model)
            for tensor in plan.tensors
            if tensor.reads(model)
            and not tensor.optional
            and tensor.header(model) is None
            and not tensor.is_converted(model)
        ]
        if names:
            yield model, names


def check_precision(plan: Plan) -> Iterator[Finding]:
    """A `dtype` that rounds the inputs before their differences are taken."""
    dtype = dtype_from_name(plan.recipe.config.dtype)
    if dtype is None:
        return
    stored = Counter(
        header.dtype
        for tensor in plan.tensors
        for model in tensor.experts
        if (header := tensor.header(model)) is not None and header.dtype.is_floating_point
    )
    finer = [kind for kind in stored if torch.finfo(kind).eps < torch.finfo(dtype).eps]
    if finer:
        yield Finding(
            level="warning",
            what=f"dtype: {plan.recipe.config.dtype} rounds experts that are stored in {_names(finer)} before the "
            "merge: their updates are small and lose most of their digits",
            remedy=f"Set dtype: float32 and out_dtype: {plan.recipe.config.dtype}.",
        )
    elif dtype != torch.float32 and plan.recipe.config.out_dtype is None and any(m.lora for m in plan.models):
        yield Finding(
            level="hint",
            what=f"dtype: {plan.recipe.config.dtype} rounds the merged adapters before the merge",
            remedy=f"Set dtype: float32 and out_dtype: {plan.recipe.config.dtype}, with --lora-merge-dtype float32.",
        )


def check_treatments(plan: Plan) -> Iterator[Finding]:
    """Matrices whose input axis looks wrong, and embedding tables that go through the solve."""
    if not isinstance(plan.method, LayerwiseMethod):
        return
    transposed = plan.model_type(plan.models[0]) in _CONV1D_FAMILIES
    unturned, turned, tables = [], [], []
    for tensor in plan.tensors:
        shape = _shape(tensor)
        if shape is None:
            continue
        parameters = tensor.shared_parameters
        kind = treated(plan.method, tensor, shape).kind
        if kind not in ("matrix", "stack"):
            continue
        first = parameters["input_axis"] == "first"
        conv1d = transposed and _CONV1D.search(tensor.name) is not None
        if conv1d and not first:
            unturned.append(tensor.name)
        elif first and not conv1d:
            turned.append(tensor.name)
        if len(shape) == 2 and is_embedding(tensor.name, tensor.vocabulary_axis):
            tables.append(tensor.name)
    if unturned:
        published = _is_published(plan)
        yield Finding(
            level="hint" if published else "warning",
            what=f"{_some(unturned)}: this family stores them [in, out] (Conv1D), and input_axis: last takes their "
            "outputs for inputs" + (", as the authors' program does" if published else ""),
            remedy="Set input_axis to first for c_attn, c_proj and c_fc, by filters.",
        )
    if turned:
        yield Finding(
            level="warning",
            what=f"{_some(turned)}: input_axis: first, though this family stores its matrices [out, in]",
            remedy="Remove input_axis, or confine it by filters.",
        )
    if tables:
        what, remedy = table_merged_as_matrix(plan.method.name)
        yield Finding(level="warning", what=f"{_some(tables)}: {what}", remedy=remedy)


def _is_published(plan: Plan) -> bool:
    """Whether the recipe asks for the published settings, flaws included."""
    return any(tensor.shared_parameters.get("preset") == "published" for tensor in plan.tensors)


def _shape(tensor: PlannedTensor) -> Sequence[int] | None:
    model = tensor.base if tensor.base and tensor.reads(tensor.base) else tensor.experts[0]
    header = tensor.header(model)
    return None if header is None else header.shape


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _some(names: Sequence[str]) -> str:
    listed = ", ".join(names[:_MOST_NAMES])
    return listed if len(names) <= _MOST_NAMES else f"{listed} and {len(names) - _MOST_NAMES} more"
