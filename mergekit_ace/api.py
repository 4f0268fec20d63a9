"""`merge` and `inspect`: what the command line does, from Python, on folders, state dicts and live models."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from mergekit.merge_methods.api import merge_state_dicts
from mergekit.merge_methods.base import MergeMethod, TensorGroup
from mergekit.merge_methods.registry import get
from mergekit.options import MergeOptions
from safetensors.torch import load_file
from torch import Tensor

from mergekit_ace import __version__, register
from mergekit_ace.checks.preflight import require_sound_inputs, require_sound_plan
from mergekit_ace.checks.spelling import check_parameters
from mergekit_ace.engine.driver import Request
from mergekit_ace.engine.driver import merge as write_merge
from mergekit_ace.engine.workers.inline import inline
from mergekit_ace.mergekit_internals import align_dtype, bound_parameters
from mergekit_ace.methods.layerwise import LayerwiseMethod
from mergekit_ace.methods.tensors.model_depth import model_in_memory
from mergekit_ace.printable import printable
from mergekit_ace.recipe.plan import Inputs
from mergekit_ace.recipe.planning import planned
from mergekit_ace.recipe.reading import Recipe, parse_recipe, read_recipe
from mergekit_ace.recipe.values import check_method
from mergekit_ace.report.inspection import assemble, inspect_inputs, inspect_tensors
from mergekit_ace.report.model import Mode, Report, TensorReport

LOG = logging.getLogger("mergekit_ace")

Model = str | Path | Mapping[str, Tensor] | torch.nn.Module
"""A folder or a name on the hub, a state dict, or a live model."""
Models = str | Path | Sequence[Model] | Mapping[str, Model]
"""The experts, by name or in order; or a recipe file."""


class Merged:
    """A merged model.

    Attributes:
        out: the folder that was written; None for a merge in memory.
    """

    def __init__(
        self, *, out: Path | None, read: Callable[[], Mapping[str, Tensor]], inspect: Callable[[], Report]
    ) -> None:
        self.out = out
        self._read, self._inspect = read, inspect

    def __repr__(self) -> str:
        where = "" if self.out is None else f", written to {self.out}"
        return f"<Merged: {len(self.weights)} tensors{where}; .weights by name, .report for what was done to each>"

    @cached_property
    def weights(self) -> Mapping[str, Tensor]:
        """The merged tensors by name; of a folder, read when first asked for."""
        return self._read()

    @cached_property
    def report(self) -> Report:
        """What the merge did to each tensor.

        Measured when first asked for, from the same inputs: about one and a half times the time of the merge.
        """
        return self._inspect()


def merge(
    models: Models,
    *,
    base: Model | None = None,
    method: str = "ace",
    weights: Sequence[float] | None = None,
    parameters: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    options: MergeOptions | None = None,
) -> Merged:
    """Merge experts of one base.

        merged = merge(["maths", "code"], base="base", out="merged")
        merged.report.tensors[0].treatment

    Args:
        models: the experts: folders or names on the hub, state dicts, or live models, in order or by name; or a recipe
            file, which then says everything but `out`.
        base: the model that they were fine-tuned from, of the same kind.
        method: a merge method of mergekit, for a report beyond norms one of this package.
        weights: one for each expert; equal when None.
        parameters: of the method. For folders as in a recipe, filters included; for tensors in memory one value each.
        dtype: of the merged weights; that of the inputs when None.
        out: a folder to write, whole or not at all; for folders and recipes.
        overwrite: replace a model that is there.
        options: of `mergekit-yaml`, for folders and recipes.

    Returns:
        The merged weights, on the CPU for folders and on the inputs' device for tensors, and the report.

    Raises:
        TypeError: sources of several kinds, or of none that is known.
        ValueError: a value out of its range, tensors that do not fit, NaN or infinity in a checkpoint.
        RecipeError: a folder or recipe that mergekit cannot plan.
    """
    folders = _as_recipe(models, base, method, weights, parameters, dtype)
    if folders is not None:
        return _merge_folders(folders, out, overwrite, options or MergeOptions())
    if out is not None:
        raise ValueError("out is for folders: a model in memory has no configuration and no tokenizer. Save weights")
    named, base_name = _in_memory(models, base)
    given = _given(parameters, weights, len(named) - 1)
    with torch.no_grad(), model_in_memory(named[base_name]):
        merged = merge_state_dicts(cast(Any, named), _method(method), base=base_name, parameters=given, out_dtype=dtype)
    return Merged(
        out=None,
        read=lambda: merged,
        inspect=lambda: _inspect_tensors(named, base_name, method, given, "full"),
    )


def inspect(
    models: Models,
    *,
    base: Model | None = None,
    method: str = "ace",
    weights: Sequence[float] | None = None,
    parameters: Mapping[str, Any] | None = None,
    mode: Mode = "full",
    options: MergeOptions | None = None,
) -> Report:
    """Report what a merge would do to each tensor, without making it.

        report = inspect(["maths", "code"], base="base")
        max(report.tensors, key=lambda tensor: tensor.heterogeneity or 0).name

    Args:
        models: as for `merge`.
        base: as for `merge`.
        method: as for `merge`.
        weights: as for `merge`.
        parameters: as for `merge`.
        mode: `fast` for norms and heterogeneity, `full` for merges too.
        options: of `mergekit-yaml`, for folders and recipes.

    Raises:
        TypeError, ValueError, RecipeError: as `merge`; but a tensor of a folder that cannot be merged does not raise:
            its report says so.
    """
    folders = _as_recipe(models, base, method, weights, parameters, None)
    if folders is not None:
        return _inspect_folders(folders, mode, options or MergeOptions())
    named, base_name = _in_memory(models, base)
    return _inspect_tensors(named, base_name, method, _given(parameters, weights, len(named) - 1), mode)


def _as_recipe(
    models: Models,
    base: Model | None,
    method: str,
    weights: Sequence[float] | None,
    parameters: Mapping[str, Any] | None,
    dtype: torch.dtype | None,
) -> Recipe | None:
    """A recipe of folders; None for models in memory."""
    if isinstance(models, str | Path):
        if base is not None or weights is not None or parameters is not None or method != "ace":
            raise ValueError(f"base, method, weights and parameters are those of the recipe {models}; leave them out")
        return read_recipe(Path(models))
    experts = list(models.values()) if isinstance(models, Mapping) else list(models)
    paths = [isinstance(source, str | Path) for source in [*experts, *([] if base is None else [base])]]
    if not any(paths):
        return None
    if not all(paths):
        raise TypeError("models and base must all be folders or names on the hub, or all be in memory; got both")
    shares = _shares(weights, len(experts))
    document = {
        "merge_method": method,
        **({} if base is None else {"base_model": str(base)}),
        "models": [
            {"model": str(expert), **({} if weights is None else {"parameters": {"weight": share}})}
            for expert, share in zip(experts, shares, strict=True)
        ],
        **({"parameters": dict(parameters)} if parameters else {}),
        **({} if dtype is None else {"dtype": "float32", "out_dtype": str(dtype).removeprefix("torch.")}),
    }
    recipe = parse_recipe(yaml.safe_dump(document, sort_keys=False), Path("merge()"))
    for finding in check_parameters(recipe.document):  # a command warns of them; a call is written for this merge alone
        raise ValueError(f"{finding.what}. {finding.remedy}")
    return recipe


def _merge_folders(recipe: Recipe, out: str | Path | None, overwrite: bool, options: MergeOptions) -> Merged:
    _require_sound(recipe, options)
    folder = None if out is None else Path(out)
    if folder is not None:
        write_merge(Request(recipe=recipe, options=options, out=folder, overwrite=overwrite, resume=False), inline)

    def read() -> Mapping[str, Tensor]:
        if folder is not None:
            return {
                name: part for file in sorted(folder.glob("*.safetensors")) for name, part in load_file(file).items()
            }
        with planned(recipe, options) as plan:
            require_sound_plan(plan)
            merged = ((tensor.name, tensor.merge(tensor.gather())) for tensor in plan.tensors)
            return {name: tensor for name, tensor in merged if tensor is not None}

    result = Merged(out=folder, read=read, inspect=lambda: _inspect_folders(recipe, "full", options))
    if folder is None:
        result.weights  # noqa: B018  errors belong to the call
    return result


def _require_sound(recipe: Recipe, options: MergeOptions) -> None:
    for finding in require_sound_inputs(recipe, options):
        LOG.warning("%s. %s", printable(finding.what), finding.remedy)


def _inspect_folders(recipe: Recipe, mode: Mode, options: MergeOptions) -> Report:
    _require_sound(recipe, options)
    with planned(recipe, options) as plan:
        require_sound_plan(plan, complete=False)
        return assemble(plan, inspect_tensors(plan, plan.tensors, mode), mode)


def _in_memory(models: Models, base: Model | None) -> tuple[dict[str, Mapping[str, Tensor]], str]:
    """State dicts by name, the base first, and its name."""
    if base is None:
        raise ValueError("base must be the model that the experts were fine-tuned from; got None")
    assert not isinstance(models, str | Path)
    named = dict(models) if isinstance(models, Mapping) else {f"expert {t}": m for t, m in enumerate(models, 1)}
    name = "base"
    while name in named:
        name += " model"
    return {expert: _state(model) for expert, model in {name: base, **named}.items()}, name


def _state(model: Model) -> Mapping[str, Tensor]:
    if isinstance(model, torch.nn.Module):
        return model.state_dict()
    if isinstance(model, Mapping):
        return model
    raise TypeError(
        f"a model must be a folder, a name on the hub, a state dict or a module; got {type(model).__name__}"
    )


def _method(name: str) -> MergeMethod:
    register()  # a no-op where the startup hook has run
    for finding in check_method({"merge_method": name}):
        raise ValueError(f"{finding.what}. {finding.remedy}")
    return get(name)


def _given(parameters: Mapping[str, Any] | None, weights: Sequence[float] | None, experts: int) -> dict[str, Any]:
    return {**(parameters or {}), **({} if weights is None else {"weight": _shares(weights, experts)})}


def _shares(weights: Sequence[float] | None, experts: int) -> list[float]:
    if weights is None:
        return [1.0] * experts
    if len(weights) != experts:
        raise ValueError(f"weights must be one for each of the {experts} experts; got {len(weights)}")
    return [float(weight) for weight in weights]


def _inspect_tensors(
    named: Mapping[str, Mapping[str, Tensor]], base: str, method: str, given: Mapping[str, Any], mode: Mode
) -> Report:
    called = _method(method)
    reports: list[TensorReport] = []
    with model_in_memory(named[base]):
        for name in named[base]:
            group = TensorGroup.from_tensors(
                [state[name] for state in named.values()], ids=list(named), base_index=0, name=name
            )
            inputs = Inputs(group=group, parameters=bound_parameters(called, group, given))
            aligned = inputs if inputs.is_buffer else Inputs(group=align_dtype(group), parameters=inputs.parameters)
            reports.extend(inspect_inputs(called, name, aligned, mode))
    experts = tuple(name for name in named if name != base)
    ours = isinstance(called, LayerwiseMethod)
    return Report(
        producer=f"mergekit-ace {__version__}",
        recipe="models in memory",
        method=method,
        mode=mode,
        complete=True,
        base=base,
        experts=experts,
        note=None if ours else f"{method} is not a method of mergekit-ace: only the updates' norms are shown.",
        planned=len(named[base]),
        tensors=tuple(reports),
    )
