"""What adapters hold beside low-rank updates: biases, whole modules, rows of tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_ace.adapters.request import Request
from mergekit_ace.factors.model import TokenRows, Vector
from mergekit_ace.factors.tensors import AdapterError
from mergekit_ace.linalg.precision import working_dtype


@dataclass(frozen=True, kw_only=True)
class MergedTensor:
    """A merged tensor that is no low-rank update.

    Attributes:
        name: the module's of a bias or of tokens; the key in the file of a tensor that replaces the base's.
        tensor: merged, in the working dtype; or as stored, where it is no floating-point number.
        adapters: those that have it.
        indices: of tokens, one for each row.
    """

    name: str
    tensor: Tensor
    adapters: tuple[str, ...]
    indices: tuple[int, ...] = ()


def require_shapes(request: Request) -> None:
    """Refuse tensors of the same name and of different shapes, by their headers.

    Raises:
        AdapterError: naming tensor and adapter.
    """
    for kind in ("bias_updates", "replaced"):
        for name in dict.fromkeys(name for adapter in request.adapters for name in getattr(adapter, kind)):
            weights = request.parameters(f"{name}.bias" if kind == "bias_updates" else _weight_name(name))["weight"]
            first: tuple[int, ...] | None = None
            for adapter, weight in zip(request.adapters, weights, strict=True):
                vector: Vector | None = getattr(adapter, kind).get(name)
                if vector is None or weight == 0:
                    continue
                first = first or vector.shape
                if vector.shape != first:
                    raise _shapes_differ(name, first, vector.shape, adapter.name)


def merged_biases(request: Request) -> Iterator[MergedTensor]:
    """What is added to biases: `scale * sum_t w_t b_t / sum_t w_t` over all adapters, as vectors are merged."""
    names = dict.fromkeys(name for adapter in request.adapters for name in adapter.bias_updates)
    for name in names:
        parameters = request.parameters(f"{name}.bias")
        having = [adapter.bias_updates.get(name) for adapter in request.adapters]
        total = sum(weight for weight in parameters["weight"] if weight > 0)
        merged = _weighted_sum(
            request, name, having, [weight / total if total else 0.0 for weight in parameters["weight"]]
        )
        if merged is not None:
            merged.tensor.mul_(request.method.scale(parameters))
            yield merged


def merged_replacements(request: Request) -> Iterator[MergedTensor]:
    """Tensors that take the place of the base's: `sum_t w_t X_t / sum_t w_t` over the adapters that have it.

    The base's own tensor is not at hand, so that adapters without it have no part, and `lambda` none.
    """
    for key in dict.fromkeys(key for adapter in request.adapters for key in adapter.replaced):
        having = [adapter.replaced.get(key) for adapter in request.adapters]
        first = next(vector for vector in having if vector is not None)
        parameters = request.parameters(_weight_name(key))
        if request.method.treat(_weight_name(key), first.shape, None, parameters, heads="none").kind == "base":
            continue
        merged = _same(request, key, having) or _weighted_sum(
            request, key, having, _shares(parameters["weight"], having)
        )
        if merged is not None:
            yield merged


def merged_tokens(request: Request) -> Iterator[MergedTensor]:
    """Rows of embedding tables: every token's is the weighted mean over the adapters that trained it."""
    for name in dict.fromkeys(name for adapter in request.adapters for name in adapter.tokens):
        parameters = request.parameters(f"{name}.weight")
        having = [adapter.tokens.get(name) for adapter in request.adapters]
        if not any(weight > 0 for weight, tokens in zip(parameters["weight"], having, strict=True) if tokens):
            continue
        indices = sorted({index for tokens in having if tokens is not None for index in tokens.indices})
        yield _merged_rows(request, name, having, parameters["weight"], indices)


def _merged_rows(
    request: Request, name: str, having: Sequence[TokenRows | None], weights: Sequence[float], indices: Sequence[int]
) -> MergedTensor:
    places = {index: place for place, index in enumerate(indices)}
    width = next(tokens.rows.shape[1] for tokens in having if tokens is not None)
    total = torch.zeros(len(indices), width, device="cpu")
    counted = torch.zeros(len(indices), 1, device="cpu")
    owners = []
    for adapter, tokens, weight in zip(request.adapters, having, weights, strict=True):
        if tokens is None or weight == 0:
            continue
        if tokens.rows.shape[1] != width:
            raise _shapes_differ(name, (width,), tokens.rows.shape[1:], adapter.name)
        rows = [places[index] for index in tokens.indices]
        values = _finite(tokens.rows.read(), name, adapter.name).cpu()
        total = total.to(values.dtype)
        total[rows] += weight * values
        counted[rows] += weight
        owners.append(adapter.name)
    trained = counted[:, 0] > 0
    kept = tuple(index for index, has in zip(indices, trained.tolist(), strict=True) if has)
    return MergedTensor(name=name, tensor=total[trained] / counted[trained], adapters=tuple(owners), indices=kept)


def _weighted_sum(
    request: Request, name: str, having: Sequence[Vector | None], weights: Sequence[float]
) -> MergedTensor | None:
    total: Tensor | None = None
    owners = []
    for adapter, vector, weight in zip(request.adapters, having, weights, strict=True):
        if vector is None or weight == 0:
            continue
        tensor = vector.read()
        if total is not None and total.shape != tensor.shape:
            raise _shapes_differ(name, tuple(total.shape), vector.shape, adapter.name)
        owners.append(adapter.name)
        if not tensor.is_floating_point():
            total = tensor.clone() if total is None else total
            continue
        part = _finite(tensor, name, adapter.name).mul(weight)
        total = part if total is None else total.add_(part)
    return None if total is None else MergedTensor(name=name, tensor=total, adapters=tuple(owners))


def _same(request: Request, name: str, having: Sequence[Vector | None]) -> MergedTensor | None:
    """The tensor that all adapters have alike, such as a table of the base that peft saves too: its bits are kept."""
    owners = [adapter.name for adapter, vector in zip(request.adapters, having, strict=True) if vector is not None]
    first, *others = [vector for vector in having if vector is not None]
    if any(vector.shape != first.shape or not torch.equal(vector.read(), first.read()) for vector in others):
        return None
    return MergedTensor(name=name, tensor=first.read(), adapters=tuple(owners))


def _shares(weights: Sequence[float], having: Sequence[Vector | None]) -> list[float]:
    own = [0.0 if vector is None else weight for weight, vector in zip(weights, having, strict=True)]
    total = sum(own)
    return [weight / total if total else 0.0 for weight in own]


def _finite(tensor: Tensor, name: str, adapter: str) -> Tensor:
    if not bool(torch.isfinite(tensor).all()):
        raise AdapterError(f"{name}: every number must be finite; adapter {adapter} holds NaN or infinity. Repair it")
    return tensor.detach().to(working_dtype(tensor.dtype))


def _shapes_differ(name: str, ours: tuple[int, ...], theirs: tuple[int, ...], adapter: str) -> AdapterError:
    return AdapterError(
        f"{name} must have one shape in all adapters; got {ours}, and {theirs} in {adapter}. "
        "Heads of different tasks cannot be merged: save the adapters without them (modules_to_save)"
    )


def _weight_name(key: str) -> str:
    return key.removeprefix("base_model.model.").replace(".base_layer.", ".")
