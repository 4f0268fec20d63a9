"""A recipe as mergekit plans it: every output tensor with its inputs and resolved parameters.

mergekit's own planner decides what becomes of slices, filters, gradients, tokenizers and adapters, so that what is
reported is what will be merged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from mergekit.common import ModelReference, dtype_from_name
from mergekit.io import LazyTensorLoader
from mergekit.merge_methods import MergeMethod
from mergekit.merge_methods.base import ParameterScope, PerInputValues, TensorEntry, TensorGroup, TensorMetadata
from mergekit.merge_methods.registry import get as method_named
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_ace.checkpoints.headers import TensorHeader, find_header, read_headers
from mergekit_ace.checkpoints.sources import is_on_hub, model_headers
from mergekit_ace.linalg.precision import all_finite
from mergekit_ace.mergekit_internals import (
    BuildTokenizer,
    ConfiguredModuleArchitecture,
    ExecuteMergeMethodTask,
    LoaderCache,
    LoadTensor,
    MergePlanner,
    SaveTensor,
    Task,
    TokenizerInfo,
    align_dtype,
    can_convert_checkpoint_keys,
    conversion_sources,
    execution_order,
    get_architecture_info,
    in_recipe_order,
    model_out_config,
)
from mergekit_ace.methods.output_range import require_in_range
from mergekit_ace.recipe.open_checkpoints import open_checkpoints
from mergekit_ace.recipe.output_shape import as_loaded, output_header
from mergekit_ace.recipe.reading import Recipe
from mergekit_ace.recipe.tokenizer import numbered_tokenizer


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a merge method receives for one tensor."""

    group: TensorGroup
    """Base and experts, in recipe order, in their common dtype, on the device of the merge."""
    parameters: Mapping[str, Any]
    """Shared values by name; per-input parameters as a mapping from model to value."""

    @property
    def is_buffer(self) -> bool:
        """Not floating point: mergekit copies it and no method sees it."""
        return not all(entry.tensor.is_floating_point() for entry in self.group.entries)


class PlannedTensor:
    """One tensor of the merged model."""

    def __init__(self, save: SaveTensor, plan: Plan) -> None:
        task = cast(ExecuteMergeMethodTask, save.tensor_task)
        self._save = save
        self._task = task
        self._plan = plan
        self.name: str = task.output_weight.name
        self.vocabulary_axis: int | None = task.output_weight.vocabulary_axis
        self.optional: bool = task.output_weight.optional
        self.base: ModelReference | None = task.base_model
        self.experts: tuple[ModelReference, ...] = tuple(model for model in task.model_order if model != self.base)
        self.shared_parameters: Mapping[str, Any] = dict(task.parameters.items())

    def input_parameters(self, model: ModelReference) -> Mapping[str, Any]:
        """The resolved parameters that one input has for itself, such as its weight."""
        return dict(self._task.input_parameters[model].items())

    @cached_property
    def _sources(self) -> Mapping[ModelReference, LoadTensor]:
        return {task.model: task for task in _descendants(self._task.gather_tensors) if isinstance(task, LoadTensor)}

    @cached_property
    def output(self) -> TensorHeader | None:
        """Shape and dtype of the merged tensor, from headers alone; None when no model has it.

        Raises:
            OSError, RuntimeError: as `read_headers`.
        """
        return output_header(self._save, self._plan)

    @cached_property
    def files(self) -> frozenset[tuple[ModelReference, str]]:
        """The checkpoint files that are read for it, by model and name."""
        return frozenset(
            (model, file) for model, source in self._sources.items() for file in self._plan.files(model, source)
        )

    def input_name(self, model: ModelReference) -> str:
        """The tensor's name in a model: another layer's when slices are stacked."""
        return self._sources[model].tensor

    def reads(self, model: ModelReference) -> bool:
        """Whether the model contributes to this tensor; with slices, not every model does."""
        return model in self._sources

    def header(self, model: ModelReference) -> TensorHeader | None:
        """Shape and dtype on disk; None when the model does not have the tensor under any of its names.

        Raises:
            OSError, RuntimeError: as `read_headers`.
        """
        source = self._sources[model]
        return find_header(self._plan.headers(model), source.tensor, source.aliases, source.tied_names)

    def loaded(self, model: ModelReference) -> TensorHeader | None:
        """As `header`, also of a tensor that mergekit makes from others when it reads the checkpoint.

        Raises:
            OSError, RuntimeError: as `read_headers`.
        """
        return self.header(model) or (as_loaded(self._sources[model], self._plan) if self.is_converted(model) else None)

    def names(self, model: ModelReference) -> frozenset[str]:
        """The names under which mergekit looks for the tensor in a model."""
        source = self._sources[model]
        return frozenset((source.tensor, *(source.aliases or ()), *(source.tied_names or ())))

    def is_converted(self, model: ModelReference) -> bool:
        """Whether mergekit makes the tensor from others when it reads the checkpoint, so no header knows it."""
        names = set(self._plan.headers(model))
        return bool(can_convert_checkpoint_keys(self._plan.model_type(model), names, self.input_name(model)))

    def read(self, model: ModelReference) -> torch.Tensor | None:
        """One model's tensor as stored, before any tokenizer's permutation; None if optional and absent."""
        tensor: torch.Tensor | None = self._sources[model].execute()
        return tensor

    def gather(self) -> Mapping[ModelReference, Tensor]:
        """Read what the models have of it, with vocabularies aligned; may run in a thread of its own (`Plan.reader`).

        Raises:
            ValueError, RuntimeError, KeyError, OSError, SafetensorError: whatever stops mergekit at this tensor.
        """
        tensors: Mapping[ModelReference, Tensor] = self._plan.evaluate(self._task.gather_tensors)
        return tensors

    def merge(self, tensors: Mapping[ModelReference, Tensor]) -> Tensor | None:
        """What mergekit saves for the gathered tensors, on the CPU; None for an optional tensor that too few have.

        Raises:
            ValueError, RuntimeError: as the merge method, and for a tensor that must be there; for weights that exceed
                the output's dtype.
        """
        if self._task.uses_accelerator():
            tensors = {model: tensor.to(self._plan.device) for model, tensor in tensors.items()}
        merged: Tensor | None = self._task.execute(tensors=dict(tensors))
        if merged is None:
            if not self.optional:
                raise RuntimeError(f"{self.name}: every model must have it; no model does")
            return None
        dtype = dtype_from_name(self._save.dtype) or merged.dtype
        merged = merged.to("cpu")  # before rounding, as mergekit does
        stored = merged.to(dtype)
        if dtype != merged.dtype and all_finite(merged):  # what other methods make of NaN is theirs
            require_in_range(self.name, stored, merged.dtype)
        return stored.contiguous()

    def load(self) -> Inputs | None:
        """Read base and experts, and align vocabularies and dtypes as mergekit does for the merge.

        Returns:
            None for an optional tensor that no model has.

        Raises:
            ValueError, RuntimeError, KeyError, OSError, SafetensorError: whatever stops mergekit at this tensor.
        """
        tensors = self._plan.evaluate(self._task.gather_tensors)
        entries = tuple(
            TensorEntry(id=model, tensor=tensors[model].to(self._plan.device), is_base=model == self.base)
            for model in self._task.model_order
            if tensors.get(model) is not None
        )
        if not entries:
            return None
        group = TensorGroup(entries=entries, metadata=TensorMetadata.from_weight_info(self._task.output_weight))
        method = self._plan.method
        method.validate_inputs([entry.id for entry in entries], self.base, group_name=self.name)
        group.validate_tensors()
        parameters = dict(self.shared_parameters)
        for parameter in method.spec.input_parameters:
            contributors = entries if parameter.scope == ParameterScope.INPUT else group.non_base
            present = {entry.id for entry in contributors}
            values = [(m, self._task.input_parameters[m][parameter.name]) for m in tensors if m in present]
            parameters[parameter.name] = PerInputValues(values)
        inputs = Inputs(group=group, parameters=parameters)
        return inputs if inputs.is_buffer else Inputs(group=align_dtype(group), parameters=parameters)


class Plan:
    """All tensors of a merge, in the order of the model: embeddings, layers, head."""

    def __init__(
        self, recipe: Recipe, options: MergeOptions, loaders: LoaderCache, *, headers_only: bool = False
    ) -> None:
        config = recipe.config.model_copy(deep=True)  # the planner rewrites what it is given
        self.recipe = recipe
        self.options = options
        self.method: MergeMethod = method_named(config.merge_method)
        self.device = torch.device(options.device or "cpu")
        self.base: ModelReference | None = config.base_model
        self.models: Sequence[ModelReference] = in_recipe_order(config)
        self._loaders = loaders
        self._headers_only = headers_only
        self._headers: dict[ModelReference, Mapping[str, TensorHeader]] = {}
        self._tokenizers: dict[BuildTokenizer, TokenizerInfo] = {}
        self.architecture = get_architecture_info(config, options)
        self.out_config = model_out_config(config, self.architecture, trust_remote_code=options.trust_remote_code)
        """transformers' configuration of the merged model; its vocabulary is still the base's."""
        planner = MergePlanner(config, self.architecture, options=options, out_model_config=self.out_config)
        # Nothing is written: the tasks that would write are not run. (`plan_in_memory` fails on a type of its own.)
        self._targets = planner.plan_to_disk(out_path="")
        saves = [task for task in self._targets if isinstance(task, SaveTensor)]
        self.tensors = tuple(PlannedTensor(save, self) for save in saves)

    @property
    def experts(self) -> Sequence[ModelReference]:
        """Every model but the base."""
        return [model for model in self.models if model != self.base]

    def headers(self, model: ModelReference) -> Mapping[str, TensorHeader]:
        """A checkpoint's headers, read once."""
        if model not in self._headers and self._headers_only and is_on_hub(model.model):
            self._headers[model] = model_headers(model.model)
        if model not in self._headers:
            self._headers[model] = read_headers(self._loaders.get(model).index)
        return self._headers[model]

    def used(self, model: ModelReference) -> frozenset[str]:
        """Names in a model's files of what the merge reads, and of what a recipe of slices leaves out on purpose."""
        wanted: set[str] = set()
        for tensor in self.tensors:
            if tensor.reads(model):
                wanted |= tensor.names(model)
        wanted |= self._left_out(model)
        headers = self.headers(model)
        # Under another layout than transformers loads, such as one tensor an expert of a mixture.
        converted = conversion_sources(self.model_type(model), headers, wanted - headers.keys())
        return frozenset(wanted & headers.keys()) | converted

    def _left_out(self, model: ModelReference) -> set[str]:
        config = self.recipe.config
        sliced = {name for name, module in (config.modules or {}).items() if module.slices}
        names: set[str] = set()
        for name, module in self.architecture.modules.items():
            if not config.slices and name not in sliced:
                continue
            configured = ConfiguredModuleArchitecture(
                info=module.architecture,
                config=model.config(trust_remote_code=self.options.trust_remote_code),
                weight_prefix=module.weight_prefix,
            )
            for weight in configured.all_weights():
                names |= {weight.name, *(weight.aliases or ()), *(weight.tied_names or ())}
        return names

    def model_type(self, model: ModelReference) -> str:
        """`model_type` of a model's configuration."""
        return str(model.config(trust_remote_code=self.options.trust_remote_code).model_type)

    @cached_property
    def execution_order(self) -> Sequence[PlannedTensor]:
        """The tensors in the order in which mergekit makes and saves them."""
        by_name = {tensor.name: tensor for tensor in self.tensors}
        return [by_name[save.tensor_name] for save in execution_order(self._targets)]

    def files(self, model: ModelReference, source: LoadTensor) -> frozenset[str]:
        """Names of the checkpoint's files that hold a tensor; all of them for one that mergekit converts."""
        index = self._loaders.get(model).index
        names = (source.tensor, *(source.aliases or ()), *(source.tied_names or ()))
        held = next((index.tensor_paths[name] for name in names if name in index.tensor_paths), None)
        return frozenset(shard.filename for shard in index.shards) if held is None else frozenset((held,))

    def folder(self, model: ModelReference) -> Path:
        """Where a model's weights are: its own folder, the hub's cache, or the adapter cache."""
        return Path(self._loaders.get(model).index.base_path)

    @cached_property
    def tokenizer(self) -> TokenizerInfo | None:
        """The tokenizer that the recipe's `tokenizer` makes and every model's numbering in it; None without one."""
        task = next((target for target in self._targets if isinstance(target, BuildTokenizer)), None)
        return None if task is None else self._numbered(task)

    def _numbered(self, task: BuildTokenizer) -> TokenizerInfo:
        if task not in self._tokenizers:
            self._tokenizers[task] = numbered_tokenizer(task)
        return self._tokenizers[task]

    def evaluate(self, task: Task[Any]) -> Any:
        """Run a task and what it needs. Nothing is kept but the tokenizer, which is the same for every tensor."""
        if isinstance(task, BuildTokenizer):
            return self._numbered(task)
        return task.execute(**{name: self.evaluate(needed) for name, needed in task.arguments().items()})

    @contextmanager
    def reader(self) -> Iterator[None]:
        """Let the calling thread read checkpoints too, by file handles of its own."""
        with open_checkpoints(self.options) as loaders:
            for model in self.models:
                loaders.loaders[model] = LazyTensorLoader(self._loaders.get(model).index, self.options.lazy_unpickle)
            yield


def _descendants(task: Task[Any]) -> Iterator[Task[Any]]:
    for needed in task.arguments().values():
        yield needed
        yield from _descendants(needed)
