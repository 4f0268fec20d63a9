"""Singular values of a task vector."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mergekit_ace.report.interference import small_gram
from mergekit_ace.report.model import Spectrum

_MOST_POINTS = 64


def spectrum(matrix: Tensor) -> Spectrum:
    """At most 64 singular values: evenly spaced by the logarithm of their rank, the first and the last among them.

    Args:
        matrix: `[m, n]`.
    """
    return thinned(singular_values(matrix))


def singular_values(matrix: Tensor) -> Tensor:
    """All singular values of `matrix` `[m, n]`, descending, `[min(m, n)]` float64 on the CPU.

    From the eigenvalues of the smaller Gram matrix, in float64: exact to about 1e-8 of the largest, at a third of the
    cost of a singular value decomposition.
    """
    eigenvalues = torch.linalg.eigvalsh(small_gram(matrix.double()))
    values: Tensor = eigenvalues.flip(0).clamp(min=0).sqrt().cpu()
    return values


def thinned(values: Tensor) -> Spectrum:
    """At most 64 of the values, as `spectrum`."""
    count = len(values)
    steps = max(1, min(_MOST_POINTS, count) - 1)
    ranks = sorted({round(math.exp(math.log(count) * step / steps)) for step in range(steps + 1)}) if count else []
    return Spectrum(ranks=tuple(ranks), values=tuple(float(values[rank - 1]) for rank in ranks))
