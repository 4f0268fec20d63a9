"""The arithmetic of one matrix's merge, by method: counts that a machine's speeds turn into seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergekit_ace.matrix.workload import multiply_adds
from mergekit_ace.methods.ace import Ace
from mergekit_ace.methods.layerwise import LayerwiseMethod


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """Counts, added up over matrices.

    Attributes:
        single: multiply-adds in the working dtype.
        double: multiply-adds in float64.
        cubes: sizes cubed of float64 eigendecompositions.
    """

    single: float = 0.0
    double: float = 0.0
    cubes: float = 0.0

    def __add__(self, other: Arithmetic) -> Arithmetic:
        return Arithmetic(
            single=self.single + other.single, double=self.double + other.double, cubes=self.cubes + other.cubes
        )

    def __mul__(self, count: float) -> Arithmetic:
        return Arithmetic(single=count * self.single, double=count * self.double, cubes=count * self.cubes)


def arithmetic_of(
    method: LayerwiseMethod, parameters: Mapping[str, Any], m: int, n: int, experts: int, *, measured: int = 0
) -> Arithmetic:
    """What a method does to one `[m, n]` matrix of full fine-tunes; updates of low rank take less.

    Args:
        method: of the recipe.
        parameters: of the tensor.
        m: rows.
        n: columns.
        experts: how many.
        measured: inputs that each second moment is the mean of; 0 for estimates.
    """
    small = min(m, n)
    if method.name == "tsv_m":
        k = max(1, small // max(1, experts))
        return _triples(m, n, k) * experts + _polar(m, experts * k) + _polar(n, experts * k) + _product(m, n, small)
    if method.name == "iso_c":
        return _triples(m, n, small) + _product(m, n, small)
    if method.name == "iso_cts":
        common = int(parameters["common_fraction"] * small)
        k = (small - common) // max(1, experts)
        own = (_triples(m, n, k) + _product(m, n, common) * 2) * experts
        return _triples(m, n, common) + own + _polar(m, experts * k) + _polar(n, small) + _product(m, n, small)
    if method.name == "cart":
        k = int(parameters["rank_fraction"] * small)
        return (_triples(m, n, k) + _product(m, n, k)) * (experts if k else 0)
    if method.name == "wudi" and parameters["solver"] == "adam":
        return Arithmetic(single=experts * 1.5 * n * small * max(m, n) + float(parameters["steps"]) * m * n * n)
    if method.name == "wudi" and parameters["solver"] == "flow":
        size = min(n, experts * m)
        products = (small * small * max(m, n) / 2 + m * n * small) * experts + m * n * size
        return Arithmetic(single=products, double=float(size) ** 3, cubes=float(size) ** 3)
    # `multiply_adds` has the refinement's product of singular vectors in it.
    solve = Arithmetic(single=multiply_adds(m, n, experts, measured=measured) - small * small * max(m, n))
    refinement = method.options(parameters).refinement if isinstance(method, Ace) else None
    k = int(refinement.fraction * small) if refinement is not None else 0
    return solve if k == 0 else solve + _triples(m, n, k) + _product(m, n, k)


def _triples(m: int, n: int, k: int) -> Arithmetic:
    """`singular_triples`: the smaller Gram matrix, its eigendecomposition and the other side's vectors, in float64."""
    small, large = min(m, n), max(m, n)
    return Arithmetic(double=small * small * large / 2 + k * m * n, cubes=small**3)


def _polar(rows: int, columns: int) -> Arithmetic:
    return _triples(rows, columns, min(rows, columns)) + _product(rows, columns, min(rows, columns))


def _product(m: int, n: int, k: int) -> Arithmetic:
    return Arithmetic(single=float(m) * n * k)
