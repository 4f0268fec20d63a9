"""The second moment of a layer's sampled inputs, and how much of it is sampling error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_ace.linalg.precision import squared_norm
from mergekit_ace.linalg.symmetric import gram


@dataclass(frozen=True, kw_only=True)
class SampledMoment:
    """The second moment `C = F^T F` of sampled inputs, and its error.

    Attributes:
        factor: `F`, `[r, n]`, `r = min(tokens, n)`, upper triangular, float32.
        tokens: how many inputs it is the mean of.
        prompts: that they come from.
        error: share of the off-diagonal energy `sum_{i != j} c_ij^2` that is sampling error, in `(0, 1]`.
    """

    factor: Tensor
    tokens: int
    prompts: int
    error: float


def second_moment(samples: Sequence[Tensor]) -> SampledMoment:
    """The mean of `x^T x` over all sampled inputs, as a triangular factor, and an estimate of its error.

    `F` is the R of a QR decomposition of the inputs: it depends on their second moment alone (but for signs), so that
    neither single inputs nor their order can be read from it.

    Inputs of one prompt depend on one another, so the error is estimated from the prompts, as in cluster sampling: with
    `C_p` the mean over prompt p, of `w_p` of all tokens,

        error = P / (P - 1) sum_p w_p^2 ||offdiag(C_p - C)||_F^2 / ||offdiag(C)||_F^2

    With a single prompt, each half of its tokens counts as one. At the least the error is `1 / (tokens + 1)`, as if
    what is shrunk towards were one token more: equal prompts would seem to be without error, and leave a singular
    system.

    This is the shrinkage of the off-diagonal entries that minimizes the expected squared error: Schafer and Strimmer,
    "A shrinkage approach to large-scale covariance matrix estimation", Statistical Applications in Genetics and
    Molecular Biology 4(1), 2005, target D.

    Args:
        samples: inputs `[tokens, n]` of each prompt, at least two tokens in all.
    """
    clusters = [rows.float() for rows in samples if len(rows) > 0]
    if len(clusters) == 1:
        clusters = list(torch.tensor_split(clusters[0], 2))
    rows = torch.cat(clusters)
    tokens = len(rows)
    factor = torch.linalg.qr(rows / tokens**0.5, mode="r").R
    edges = torch.tensor([0, *(len(cluster) for cluster in clusters)]).cumsum(0).tolist()
    inner = gram(rows.mT)
    diagonal = [cluster.double().square().mean(dim=0) for cluster in clusters]
    whole_diagonal = rows.double().square().mean(dim=0)
    whole = squared_norm(inner) / tokens**2 - squared_norm(whole_diagonal)
    variance = 0.0
    for start, stop, own in zip(edges[:-1], edges[1:], diagonal, strict=True):
        count = stop - start
        square = squared_norm(inner[start:stop, start:stop]) / count**2 - squared_norm(own)
        product = squared_norm(inner[start:stop]) / (count * tokens) - float(own @ whole_diagonal)
        variance += (count / tokens) ** 2 * (square - 2 * product + whole)
    variance *= len(clusters) / (len(clusters) - 1)
    error = min(1.0, max(1 / (tokens + 1), variance / whole)) if whole > 0 else 1.0
    return SampledMoment(factor=factor, tokens=tokens, prompts=len(samples), error=error)
