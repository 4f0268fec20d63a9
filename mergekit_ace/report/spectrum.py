"""Singular values of a task vector and what they sum up to."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mergekit_ace.linalg.symmetric import gram
from mergekit_ace.report.model import Spectrum

TOP = 0.05
"""The share of singular values whose energy is reported."""
_MOST_POINTS = 64


def singular_values(matrix: Tensor) -> Tensor:
    """All singular values of `matrix` `[m, n]`, descending, `[min(m, n)]` float64 on the CPU.

    From the eigenvalues of the smaller Gram matrix, in float64: exact to about 1e-8 of the largest, at a third of the
    cost of a singular value decomposition.
    """
    rows = matrix.double()
    eigenvalues = torch.linalg.eigvalsh(gram(rows.mT if rows.shape[0] < rows.shape[1] else rows))
    values: Tensor = eigenvalues.flip(0).clamp(min=0).sqrt().cpu()
    return values


def effective_rank(values: Tensor) -> float:
    """`exp(-sum_i p_i log p_i)` with `p = s / sum s`: between 1 and the rank; 0 for a zero matrix.

    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007.
    """
    total = float(values.sum())
    if total == 0:
        return 0.0
    shares = values / total
    return math.exp(float(torch.special.entr(shares).sum()))


def top_energy(values: Tensor, share: float = TOP) -> float:
    """Share of `sum s^2` in the largest `ceil(share * len(s))` singular values; 0 for a zero matrix."""
    energy = values.square()
    total = float(energy.sum())
    return float(energy[: math.ceil(share * len(values))].sum()) / total if total else 0.0


def thinned(values: Tensor) -> Spectrum:
    """At most 64 of the values: evenly spaced by the logarithm of their rank, the first and the last among them."""
    count = len(values)
    steps = max(1, min(_MOST_POINTS, count) - 1)
    ranks = sorted({round(math.exp(math.log(count) * step / steps)) for step in range(steps + 1)}) if count else []
    return Spectrum(ranks=tuple(ranks), values=tuple(float(values[rank - 1]) for rank in ranks))
