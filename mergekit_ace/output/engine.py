"""mergekit's `run_merge`, told which tensors to make: the one place that leans on how mergekit plans."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mergekit.merge
import torch
from mergekit.architecture import WeightInfo
from mergekit.architecture.conversion import convert_checkpoint_tensors
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import ConfigReader, MergeConfiguration
from mergekit.graph import Task
from mergekit.io.tasks import FinalizeModel, LoaderCache, SaveTensor
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from torch import Tensor

from mergekit_ace.output.selection import PlannedTensor
from mergekit_ace.recipe.headers import TensorHeader, find_header, read_headers
from mergekit_ace.staging import staged

Choice = Callable[[Sequence[PlannedTensor]], Sequence[PlannedTensor]]


def local_inputs(recipe: MergeConfiguration) -> list[Path]:
    """Return the folders of this machine that a recipe reads."""
    paths = [
        Path(path.path)
        for model in recipe.referenced_models()
        for path in (model.model, model.lora)
        if path is not None
    ]
    return [path for path in paths if path.exists()]


def merge_adapters(recipe: MergeConfiguration, options: MergeOptions) -> None:
    """Merge a recipe's LoRA experts into mergekit's cache, each whole or not at all.

    mergekit takes an entry that is there for a whole one, so that one left by a run that was killed would spoil every
    run after it.

    Raises:
        BlockingIOError: Another process is merging the same adapter.
    """
    for model in recipe.referenced_models():
        if model.lora is None or not options.lora_merge_cache:
            continue
        name = f"{model.model._unique_id()}_{model.lora._unique_id()}"  # type: ignore[no-untyped-call]
        entry = Path(options.lora_merge_cache, name)
        if entry.exists():
            continue
        with staged(entry) as folder:
            folder.rmdir()  # mergekit makes it
            model.merged(
                cache_dir=str(folder.parent),
                trust_remote_code=options.trust_remote_code,
                lora_merge_dtype=options.lora_merge_dtype,
            )


def run(recipe: MergeConfiguration, source: str, out: Path, options: MergeOptions, choose: Choice) -> None:
    """Run a recipe as `mergekit-yaml` does, but make the chosen tensors only.

    Args:
        recipe: What to run.
        source: Its text, for the card.
        out: The folder to write to; its name is the model's name in the card.
        options: mergekit's.
        choose: Given all tensors of the output in the order of the plan, with the sizes that the inputs' headers
            promise, returns those to make. What it raises ends the merge before it starts.
    """
    with _planner(functools.partial(_SelectivePlanner, choose=choose)):
        # A copy, for the planner rewrites what it is given.
        mergekit.merge.run_merge(recipe.model_copy(deep=True), str(out), options=options, config_source=source)


@contextlib.contextmanager
def _planner(planner: Callable[..., MergePlanner]) -> Iterator[None]:
    """Bind the name by which `run_merge` finds its planner: it takes none as an argument."""
    module: Any = mergekit.merge
    original = module.MergePlanner
    module.MergePlanner = planner
    try:
        yield
    finally:
        module.MergePlanner = original


class _SelectivePlanner(MergePlanner):
    """mergekit's planner, which notes what it has planned and hands on the chosen tensors only."""

    def __init__(self, *args: Any, choose: Choice, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._choose = choose
        self._sizes: dict[str, int] = {}
        self._headers: dict[ModelReference, Mapping[str, TensorHeader]] = {}

    def plan_tensor(
        self, weight: WeightInfo, weights_in: list[WeightInfo], models: list[ModelReference], cfg_reader: ConfigReader
    ) -> None:
        super().plan_tensor(weight, weights_in, models, cfg_reader)
        self._sizes[weight.name] = self._nbytes(weight, zip(models, weights_in, strict=True))

    def plan_to_disk(self, out_path: str) -> list[Task[Any]]:
        tasks = super().plan_to_disk(out_path)
        saves = [task for task in tasks if isinstance(task, SaveTensor)]
        planned = [PlannedTensor(name=save.tensor_name, nbytes=self._sizes[save.tensor_name]) for save in saves]
        chosen = {tensor.name for tensor in self._choose(planned)}
        if len(chosen) == len(saves):
            return tasks
        chosen_saves = tuple(save for save in saves if save.tensor_name in chosen)
        others = [task for task in tasks if not isinstance(task, SaveTensor | FinalizeModel)]
        finalize = FinalizeModel(tensor_save_tasks=chosen_saves, writer_task=saves[0].writer_task)
        return [*chosen_saves, finalize, *others]

    def _nbytes(self, weight: WeightInfo, sources: Iterable[tuple[ModelReference, WeightInfo]]) -> int:
        """Size of an output tensor, taken from the first input that has it; 0 if none does."""
        dtype = dtype_from_name(weight.force_dtype or self.config.out_dtype or self.config.dtype)
        for model, source in sources:
            tensor = self._on_meta_device(model, source)
            if tensor is not None:
                return tensor.numel() * (dtype or tensor.dtype).itemsize
        return 0

    def _on_meta_device(self, model: ModelReference, weight: WeightInfo) -> Tensor | None:
        """An input's tensor without its data."""
        cache = LoaderCache()
        if model not in self._headers:
            self._headers[model] = read_headers(cache.get(model).index)
        headers = self._headers[model]
        header = find_header(headers, weight.name, weight.aliases, weight.tied_names)
        if header is not None:
            return _empty(header)
        # Stored in another layout than transformers loads, such as one tensor an expert of a mixture.
        model_type = model.config(trust_remote_code=cache.trust_remote_code).model_type
        sources = {name: functools.partial(_empty, header) for name, header in headers.items()}
        return convert_checkpoint_tensors(model_type, sources, weight.name)


def _empty(header: TensorHeader) -> Tensor:
    return torch.empty(header.shape, dtype=header.dtype, device="meta")
