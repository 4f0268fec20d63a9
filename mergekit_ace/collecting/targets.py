"""Which tensors of a recipe are merged by second moments, and which module of the model has each as its weight."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from mergekit_ace.collecting.model import inputs_first, linear_modules
from mergekit_ace.methods.layerwise import LayerwiseMethod
from mergekit_ace.moments.fingerprint import Fingerprint, fingerprint
from mergekit_ace.recipe.failures import RecipeError
from mergekit_ace.recipe.plan import Plan, PlannedTensor
from mergekit_ace.recipe.treatments import treated


@dataclass(frozen=True, kw_only=True)
class Target:
    """One matrix of the merged model.

    Attributes:
        name: in the merged model.
        source: in the base.
        fingerprint: of the base's weight.
    """

    name: str
    source: str
    fingerprint: Fingerprint


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where a matrix's inputs are found.

    Attributes:
        target: the matrix.
        module: the module of the base model whose weight it is.
        input_first: stored `[in, out]`.
    """

    target: Target
    module: str
    input_first: bool


def find_targets(plan: Plan) -> tuple[list[Target], list[str]]:
    """The matrices that the recipe's method merges one by one, and the names of stacked ones, which are not measured.

    Raises:
        RecipeError: the method takes no second moments, or the recipe has no base.
    """
    method = plan.method
    if not isinstance(method, LayerwiseMethod) or "moments" not in {p.name for p in method.parameters}:
        raise RecipeError(
            f"{plan.recipe.name}: merge_method must be one that takes second moments (ace, wudi, actmat); "
            f"got {plan.recipe.config.merge_method}"
        )
    targets, stacks = [], []
    for tensor in plan.tensors:
        kind = _kind(plan, method, tensor)
        if kind == "stack":
            stacks.append(tensor.name)
        elif kind == "matrix":
            assert tensor.base is not None
            weight = tensor.read(tensor.base)
            assert weight is not None
            targets.append(
                Target(name=tensor.name, source=tensor.input_name(tensor.base), fingerprint=fingerprint(weight))
            )
    return targets, stacks


def _kind(plan: Plan, method: LayerwiseMethod, tensor: PlannedTensor) -> str:
    if tensor.base is None or not tensor.reads(tensor.base):
        return "average"
    header = tensor.header(tensor.base)
    if header is None:
        # Absent and optional, or made from several tensors when it is read: the latter are stacks of experts.
        return "stack" if tensor.is_converted(tensor.base) else "average"
    return treated(method, tensor, header.shape).kind


def find_sites(targets: Sequence[Target], model: nn.Module) -> tuple[list[Site], list[Target]]:
    """The module of each matrix, and the matrices that no module has as its weight.

    By name where a module of that name has the weight; else by content, for models whose modules are called otherwise
    than the tensors of their files.
    """
    modules = linear_modules(model)
    by_shape: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name, module in modules.items():
        by_shape[tuple(weight_of(module).shape)].append(name)
    sites, unmeasured = [], []
    known: dict[str, Fingerprint] = {}
    for target in targets:
        name = target.source.removesuffix(".weight")
        candidates = [name] if name in modules else by_shape[target.fingerprint.shape]
        found = [candidate for candidate in candidates if _is_weight(target, candidate, modules, known)]
        if len(found) == 1:
            sites.append(Site(target=target, module=found[0], input_first=inputs_first(modules[found[0]])))
        else:
            unmeasured.append(target)
    return sites, unmeasured


def _is_weight(target: Target, name: str, modules: Mapping[str, nn.Module], known: dict[str, Fingerprint]) -> bool:
    weight = weight_of(modules[name])
    if weight.is_meta:  # offloaded: its name and shape are all there is
        return name == target.source.removesuffix(".weight") and tuple(weight.shape) == target.fingerprint.shape
    if name not in known:
        known[name] = fingerprint(weight)
    return target.fingerprint.matches(known[name])


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a linear module, in no autograd graph."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach()
