"""Whether the stored parts of an update fit each other, by their shapes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mergekit_ace.factors.tensors import AdapterError

Shapes = Mapping[str, tuple[int, ...]]
_LOHA = (("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b"))
_LOKR = (("lokr_w1", "lokr_w1_a", "lokr_w1_b"), ("lokr_w2", "lokr_w2_a", "lokr_w2_b"))


def require_factors(down: tuple[int, ...], up: tuple[int, ...], *, adapter: str, module: str) -> None:
    """Refuse factors that are no matrices or kernels of one rank; a kernel of `up` must be 1 by 1.

    Raises:
        AdapterError: naming the module.
    """
    if min(len(down), len(up)) < 2 or 0 in (*down, *up):
        raise AdapterError(f"adapter {adapter}: the factors of {module} must be matrices; got shapes {down} and {up}")
    if down[0] != up[1]:
        raise AdapterError(f"adapter {adapter}: {module} must have factors of one rank; got {down[0]} and {up[1]}")
    if any(size != 1 for size in up[2:]):
        raise AdapterError(
            f"adapter {adapter}: the second factor of the convolution {module} must have a kernel of 1; got {up[2:]}"
        )


def require_loha(shapes: Shapes, *, adapter: str, module: str) -> None:
    """Refuse parts of a LoHa that are missing, or are no products of one shape.

    Raises:
        AdapterError: naming the module.
    """
    _require_parts(shapes, [part for pair in _LOHA for part in pair], adapter=adapter, module=module)
    outer = []
    for left, right in _LOHA:
        _require_inner(shapes, left, right, adapter=adapter, module=module)
        outer.append((shapes[left][0], shapes[right][1]))
    if outer[0] != outer[1]:
        raise AdapterError(
            f"adapter {adapter}: both products of {module} must have one shape; got {outer[0]} and {outer[1]}"
        )


def require_lokr(shapes: Shapes, *, adapter: str, module: str) -> None:
    """Refuse parts of a LoKr that are missing, or do not multiply.

    Raises:
        AdapterError: naming the module.
    """
    for whole, left, right in _LOKR:
        if whole not in shapes:
            _require_parts(shapes, [left, right], adapter=adapter, module=module)
            _require_inner(shapes, left, right, adapter=adapter, module=module)


def scalar(tensor: Tensor, *, adapter: str, what: str) -> float:
    """The number in a tensor of one element.

    Raises:
        AdapterError: it has more, or none.
    """
    if tensor.numel() != 1:
        raise AdapterError(f"adapter {adapter}: {what} must be one number; got shape {tuple(tensor.shape)}")
    return float(tensor)


def _require_parts(shapes: Shapes, parts: list[str], *, adapter: str, module: str) -> None:
    missing = [part for part in parts if part not in shapes]
    if missing:
        raise AdapterError(f"adapter {adapter}: {module} must have {' and '.join(parts)}; it lacks {missing[0]}")


def _require_inner(shapes: Shapes, left: str, right: str, *, adapter: str, module: str) -> None:
    if shapes[left][1] != shapes[right][0]:
        raise AdapterError(
            f"adapter {adapter}: {module} must have factors of one rank; got {shapes[left]} of {left} and "
            f"{shapes[right]} of {right}"
        )
