"""What this package uses of mergekit beyond its public interface: the one module to read when mergekit changes.

mergekit 0.1.5 has no plugin interface for planning or running a merge. The planner, the tasks of its graph and the
functions that write configuration and tokenizer are imported here and nowhere else, and `require_known_mergekit`
refuses a mergekit in which one of them takes other arguments than this package was written for. Nothing of mergekit is
replaced: other threads of the process, and `mergekit-yaml`, see it as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from mergekit._data import chat_templates
from mergekit.architecture import (
    ConfiguredModuleArchitecture,
    WeightInfo,
    arch_info_for_config,
    get_architecture_info,
)
from mergekit.architecture.conversion import (
    _expanded_target_keys,
    can_convert_checkpoint_keys,
    convert_checkpoint_tensors,
)
from mergekit.card import CARD_TEMPLATE, method_md
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.graph import Task, TaskUniverse, build_schedule
from mergekit.io.tasks import FinalizeModel, GatherTensors, LoaderCache, LoadTensor, SaveTensor
from mergekit.merge import (
    _copy_tagalong_files,
    _copy_tokenizer,
    _model_out_config,
    _set_chat_template,
    _update_config_vocab,
)
from mergekit.merge_methods.base import MergeMethod, TensorGroup
from mergekit.merge_methods.dtype import align_dtype
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from mergekit.parameter_resolver import resolve_parameters
from mergekit.plan import MergePlanner
from mergekit.tokenizer import BuildTokenizer, PermutedVocabulary
from mergekit.tokenizer.build import TokenizerInfo, build_tokenizer, build_union_tokenizer, get_stripped_tokenizer
from mergekit.tokenizer.truncate import TruncatedVocabulary
from pydantic import BaseModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

__all__ = [
    "CARD_TEMPLATE",
    "BuildTokenizer",
    "ConfiguredModuleArchitecture",
    "ExecuteMergeMethodTask",
    "FinalizeModel",
    "GatherTensors",
    "LoadTensor",
    "LoaderCache",
    "MergePlanner",
    "PermutedVocabulary",
    "SaveTensor",
    "Task",
    "TokenizerInfo",
    "TruncatedVocabulary",
    "WeightInfo",
    "adapter_entry_name",
    "align_dtype",
    "architecture_is_inferred",
    "bound_parameters",
    "build_tokenizer",
    "build_union_tokenizer",
    "can_convert_checkpoint_keys",
    "chat_template_names",
    "conversion_sources",
    "convert_checkpoint_tensors",
    "copy_tagalong_files",
    "copy_tokenizer",
    "execution_order",
    "get_architecture_info",
    "get_stripped_tokenizer",
    "in_recipe_order",
    "method_md",
    "model_out_config",
    "require_known_mergekit",
    "resolve_parameters",
    "set_chat_template",
    "update_config_vocab",
]

model_out_config = _model_out_config
update_config_vocab = _update_config_vocab
set_chat_template = _set_chat_template
copy_tokenizer = _copy_tokenizer
copy_tagalong_files = _copy_tagalong_files

_KNOWN = "0.1.5"
"""The version that the tests run with."""

_FUNCTIONS: Mapping[Any, str] = {
    _model_out_config: "config arch_info trust_remote_code",
    _update_config_vocab: "config arch_info tokenizer pad_to_multiple_of",
    _set_chat_template: "tokenizer merge_config trust_remote_code",
    _copy_tokenizer: "merge_config out_path options",
    _copy_tagalong_files: "merge_config out_path files options",
    build_tokenizer: "base_model referenced_models tokenizer_source trust_remote_code add_tokens",
    build_union_tokenizer: "base_tok tokenizers trust_remote_code",
    get_stripped_tokenizer: "path trust_remote_code",
    build_schedule: "targets cached_values",
    convert_checkpoint_tensors: "model_type source_tensors target_key",
    can_convert_checkpoint_keys: "model_type source_keys target_key",
    _expanded_target_keys: "renamed_key target_patterns",
    arch_info_for_config: "config",
    get_architecture_info: "config options",
    align_dtype: "group dtype",
    MergePlanner.__init__: "self config arch_info options out_model_config",
    MergePlanner.plan_to_disk: "self out_path",
    resolve_parameters: "spec tensor_name inputs sources base_model t",
    ModelReference.merged: "self cache_dir trust_remote_code lora_merge_dtype",
    ModelReference.lazy_loader: "self cache_dir lazy_unpickle",
}

_TASKS: Mapping[type[BaseModel], str] = {
    LoadTensor: "model tensor dtype device optional aliases tied_names per_gpu",
    GatherTensors: "weight_info dtype device",
    PermutedVocabulary: "gather_tensors tokenizer_task tokens pad_to_multiple_of base_model vocabulary_axis",
    TruncatedVocabulary: "gather_tensors weight_info",
    ExecuteMergeMethodTask: "method_name gather_tensors model_order base_model output_weight parameters "
    "input_parameters dtype out_dtype",
    SaveTensor: "tensor_name tensor_task writer_task clone optional dtype force_main_thread",
    BuildTokenizer: "base_model referenced_models tokenizer_source add_tokens trust_remote_code",
    TokenizerInfo: "tokenizer permutations original_vocabs",
}


def changes() -> list[str]:
    """What the installed mergekit has otherwise than this package expects, one line each; empty for a known one."""
    found = []
    for function, expected in _FUNCTIONS.items():
        actual = " ".join(inspect.signature(function).parameters)
        if actual != expected:
            found.append(f"{function.__module__}.{function.__qualname__} takes ({actual}) in place of ({expected})")
    for task, expected in _TASKS.items():
        actual = " ".join(task.model_fields)
        if actual != expected:
            found.append(f"{task.__module__}.{task.__qualname__} has ({actual}) in place of ({expected})")
    return found


def require_known_mergekit() -> None:
    """Refuse a mergekit whose internals have changed.

    Raises:
        RuntimeError: naming its version and what has changed.
    """
    if version("mergekit") != _KNOWN and (found := changes()):
        raise RuntimeError(
            f"mergekit must have the internals of {_KNOWN}; got {version('mergekit')}, where {'; '.join(found)}. "
            f"Install mergekit=={_KNOWN}, or a newer mergekit-ace"
        )


def conversion_sources(model_type: str, names: Iterable[str], targets: AbstractSet[str]) -> frozenset[str]:
    """Which tensors of a checkpoint transformers converts into one of the targets, by names alone.

    One pass over the names; `can_convert_checkpoint_keys` takes one for each target.
    """
    transforms: Any = get_checkpoint_conversion_mapping(model_type) if targets else None  # type: ignore[no-untyped-call]
    sources = set()
    for name in names if transforms else ():
        current = name
        for transform in transforms:
            renamed, pattern = transform.rename_source_key(current)
            if pattern is None:
                continue
            if isinstance(transform, WeightRenaming):
                current = renamed
            elif not targets.isdisjoint(_expanded_target_keys(renamed, transform.target_patterns)):
                sources.add(name)
        if current in targets:
            sources.add(name)
    return frozenset(sources)


def architecture_is_inferred(config: MergeConfiguration, options: MergeOptions) -> bool:
    """Whether mergekit has no definition of a model's architecture, and takes it from the checkpoints' tensors."""
    return any(
        arch_info_for_config(model.config(trust_remote_code=options.trust_remote_code)) is None
        for model in in_recipe_order(config)
    )


def chat_template_names() -> list[str]:
    """The names by which a recipe's `chat_template` takes one of mergekit's own."""
    names = (file.name for file in files(chat_templates).iterdir())
    return sorted(name.removesuffix(".jinja") for name in names if name.endswith(".jinja"))


def adapter_entry_name(model: ModelReference) -> str:
    """The folder that `ModelReference.merged` makes for `base+adapter` in a cache folder."""
    assert model.lora is not None
    return f"{model.model._unique_id()}_{model.lora._unique_id()}"  # type: ignore[no-untyped-call]


def bound_parameters(method: MergeMethod, group: TensorGroup, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The parameters that a method receives for a group of tensors in memory, validated.

    Raises:
        TypeError, ValueError: as a merge by `merge_state_dicts`.
    """
    (bound,) = method._bind_parameters((group,), given)
    return bound


def execution_order(targets: Sequence[Task[Any]]) -> list[SaveTensor]:
    """The tensors in the order in which mergekit's executor saves them: it decides which shard each is in."""
    universe = TaskUniverse(targets)
    schedule = build_schedule([universe.add_task(target) for target in targets], cached_values={})
    return [task for handle in schedule.tasks if isinstance(task := handle.task(), SaveTensor)]


class OrderedRecipe(MergeConfiguration):
    """A recipe whose models have an order: base first, then as listed.

    mergekit goes through a set, whose order differs from process to process: with it the donor of the tokenizer where
    there is no base, the architecture under `--allow-crimes`, and the numbers of added tokens.
    """

    def referenced_models(self) -> list[ModelReference]:
        """Every model once, in the recipe's order."""
        return in_recipe_order(self)


def in_recipe_order(config: MergeConfiguration) -> list[ModelReference]:
    """Every model of a recipe once: the base, then the others as listed."""
    modules = [*(config.modules or {}).values()]
    slices = [*(config.slices or []), *(part for module in modules for part in module.slices or [])]
    listed = [*(config.models or []), *(entry for module in modules for entry in module.models or [])]
    named = [entry.model for entry in listed] + [source.model for part in slices for source in part.sources]
    bases = [config.base_model] if config.base_model else []
    return list(dict.fromkeys([*bases, *named]))
