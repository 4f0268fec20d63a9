"""Input tensors that no output tensor is made of: what mergekit's definition of an architecture lacks is lost."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from mergekit.common import ModelReference

from mergekit_ace.checkpoints.headers import TensorHeader
from mergekit_ace.checks.prefixes import renamed_remedy
from mergekit_ace.checks.tensors import missing_tensors
from mergekit_ace.recipe.failures import RecipeError
from mergekit_ace.recipe.findings import Finding
from mergekit_ace.recipe.plan import Plan

_MOST_NAMES = 8
# What transformers computes anew for every model: nothing is lost with it.
_COMPUTED = re.compile(r"(?:^|\.)(?:inv_freq|masked_bias|position_ids|(?:cos|sin)_cached)$")
_CAUSAL_MASK = re.compile(r"\.attn\.bias$")


def check_unused(plan: Plan) -> Iterator[Finding]:
    """One finding a model: a warning for weights, a hint for constants that are computed anew.

    Layers that a recipe with slices leaves out are meant to be left out.
    """
    base = unused_tensors(plan, plan.base) if plan.base is not None else []
    renamed = {model for model, names in missing_tensors(plan) if renamed_remedy(names, plan.headers(model))}
    for model in plan.models:
        if model in renamed:  # its tensors are not lost: they have other names
            continue
        names = unused_tensors(plan, model)
        if model.lora is not None and names == base:  # an adapter brings none of its own
            continue
        headers = plan.headers(model)
        computed = [name for name in names if is_computed(name, headers[name])]
        weights = [name for name in names if name not in set(computed)]
        if weights:
            yield Finding(
                level="warning",
                what=f"{model} has {_count(weights)} that no output tensor is made of, and the merged model will lack "
                + ("it" if len(weights) == 1 else "them")
                + f": {_listed(weights)}",
                remedy="mergekit's definition of the architecture does not know them. Copy them from one of the models "
                "into the output if it needs them, or merge the files with mergekit-pytorch, which takes every tensor.",
            )
        if computed:
            yield Finding(
                level="hint",
                what=f"{model} has {_count(computed)} that the merged model will lack: {_listed(computed)}",
                remedy="Nothing to do: they are constants that transformers computes when it loads a model.",
            )


def require_all_used(lost: Sequence[Finding]) -> None:
    """Refuse a merge that loses weights; constants that are computed anew may go.

    Args:
        lost: what `check_unused` has found.

    Raises:
        RecipeError: naming them, by model.
    """
    weights = [f"{finding.what}. {finding.remedy}" for finding in lost if finding.level == "warning"]
    if weights:
        raise RecipeError("\n".join(weights))


def unused_tensors(plan: Plan, model: ModelReference) -> Sequence[str]:
    """Names in a model's files of what the merge does not read, in the order of the files.

    Raises:
        OSError, RuntimeError: as `read_headers`.
    """
    used = plan.used(model)
    return [name for name in plan.headers(model) if name not in used]


def is_computed(name: str, header: TensorHeader) -> bool:
    """Whether it is a constant that transformers makes itself: rotary frequencies, masks, numbers of positions."""
    if _COMPUTED.search(name):
        return True
    # GPT-2's causal masks have the name of a bias; those have one dimension.
    return _CAUSAL_MASK.search(name) is not None and len(header.shape) == 4


def _count(names: Sequence[str]) -> str:
    return "1 tensor" if len(names) == 1 else f"{len(names)} tensors"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MOST_NAMES])
    return shown if len(names) <= _MOST_NAMES else f"{shown} and {len(names) - _MOST_NAMES} more"
