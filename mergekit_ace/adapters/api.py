"""`merge_adapters`: adapters in, one adapter out, from Python."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mergekit.config import ParameterSetting
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from mergekit_ace.adapters.from_recipe import method_called
from mergekit_ace.adapters.request import Request
from mergekit_ace.adapters.result import MergedAdapter, in_memory
from mergekit_ace.adapters.truncation import Rank
from mergekit_ace.adapters.write import write_merged
from mergekit_ace.damaged_files import message_of
from mergekit_ace.factors.model import Adapter
from mergekit_ace.factors.opening import (
    adapter_from_tensors,
    adapters_inside,
    adapters_of_model,
    open_adapter,
    plain_settings,
)
from mergekit_ace.factors.tensors import AdapterError
from mergekit_ace.staging import staged

_SETTINGS = TypeAdapter(dict[str, ParameterSetting])
Source = str | Path | tuple[Mapping[str, Tensor], Any] | Mapping[str, Tensor]
"""A folder or file; a state dict with peft's configuration, its dict or itself; a state dict of a diffusion adapter."""


def merge_adapters(
    adapters: Iterable[Source] | Any,
    *,
    method: str = "ace",
    weights: Sequence[float] | None = None,
    parameters: Mapping[str, Any] | None = None,
    rank: Rank = None,
    base: str | None = None,
    dtype: torch.dtype = torch.float32,
    out: str | Path | None = None,
    overwrite: bool = False,
) -> MergedAdapter:
    """Merge adapters of one base model to one adapter, by the factors alone; the base is not needed.

        merged = merge_adapters(["maths", "code", "law"], out="all-three")
        merged.report.weights[0].outputs_kept

    Args:
        adapters: folders or files, state dicts, or a live `PeftModel`, whose adapters are merged; or a folder of
            several.
        method: of the catalogue, as in recipes: `mergekit-ace methods` lists them.
        weights: one for each adapter; equal when None.
        parameters: of the method, as in a recipe's `parameters`, filters included.
        rank: of the result: a number; `auto`, the smallest that keeps 99 percent of each update's energy; or None:
            no loss, up to the sum of the ranks.
        base: the model that they are adapters of, where they name it differently.
        dtype: of the result's tensors.
        out: a folder to write, whole or not at all.
        overwrite: replace an adapter that is there.

    Raises:
        AdapterError: an adapter cannot be read or merged, or does not fit the others.
        ValueError: a parameter is unknown, or out of its range.
        FactorizationError: a system that no jitter makes positive definite.
    """
    opened = _opened(adapters)
    chosen = method_called(method)
    known = {parameter.name for parameter in chosen.parameters}
    if unknown := [name for name in parameters or {} if name not in known]:
        raise ValueError(f"parameters must be of {method}: {', '.join(sorted(known))}; got {unknown[0]}")
    if weights is not None and len(weights) != len(opened):
        raise ValueError(f"weights must be one for each of the {len(opened)} adapters; got {len(weights)}")
    _require_rank(rank)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating-point type of torch, such as torch.bfloat16; got {dtype!r}")
    request = Request(
        adapters=tuple(opened),
        method=chosen,
        shared=_SETTINGS.validate_python(dict(parameters or {})),
        own=[{"weight": weight} for weight in weights or [1.0] * len(opened)],
        base=base,
        rank=rank,
        dtype=dtype,
    )
    if out is None:
        return _merged(request)
    inputs = [Path(source) for source in _listed(adapters) if isinstance(source, str | Path)]
    with staged(Path(out), overwrite=overwrite, inputs=inputs) as folder:
        merged = _merged(request)
        write_merged(merged, folder)
    return merged


def _merged(request: Request) -> MergedAdapter:
    try:
        return in_memory(request)
    except ValidationError as error:  # of a parameter; pydantic's own words name its types
        raise ValueError(message_of(error)) from error


def _opened(adapters: Any) -> list[Adapter]:
    if hasattr(adapters, "peft_config"):
        return adapters_of_model(adapters)
    if isinstance(adapters, str | Path):
        inside = adapters_inside(Path(adapters))
        if not inside:
            raise AdapterError(f"adapters must be a list of folders, or a folder of several; got {adapters}")
        return [open_adapter(folder, name=folder.name) for folder in inside]
    return [_open(source, f"number {index}") for index, source in enumerate(_listed(adapters), 1)]


def _open(source: Any, name: str) -> Adapter:
    if isinstance(source, str | Path):
        return open_adapter(Path(source))
    if isinstance(source, tuple) and len(source) == 2 and isinstance(source[0], Mapping):
        tensors, settings = source
        if hasattr(settings, "to_dict"):  # a configuration of peft
            settings = plain_settings(settings)
        if settings is None or isinstance(settings, Mapping):
            return adapter_from_tensors(tensors, settings, name=name)
    if isinstance(source, Mapping):
        return adapter_from_tensors(source, name=name)
    raise AdapterError(
        "adapters must be folders, state dicts (for peft's a pair of state dict and configuration) or a PeftModel; "
        f"{name} is of type {type(source).__name__}"
    )


def _listed(adapters: Any) -> list[Any]:
    return (
        [] if hasattr(adapters, "peft_config") else [adapters] if isinstance(adapters, str | Path) else list(adapters)
    )


def _require_rank(rank: Rank) -> None:
    if rank is not None and rank != "auto" and not (type(rank) is int and rank > 0):
        raise ValueError(f"rank must be a whole number above 0, 'auto' or None; got {rank!r}")
