"""The normal equations where second moments of the experts' inputs were measured."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mergekit_ace.linalg.blocks import blocks
from mergekit_ace.linalg.precision import inner_product, squared_norm
from mergekit_ace.linalg.symmetric import add_to_diagonal_, gram
from mergekit_ace.matrix.decision import Decision, low_rank_share
from mergekit_ace.matrix.dense import DenseEquations
from mergekit_ace.matrix.expert import MeasuredMoment
from mergekit_ace.matrix.normal_equations import NormalEquations
from mergekit_ace.matrix.options import CovarianceOptions
from mergekit_ace.matrix.second_moment import regularize
from mergekit_ace.matrix.task_vectors import TaskVectors


def assemble_measured(task_vectors: TaskVectors, options: CovarianceOptions, decision: Decision) -> NormalEquations:
    """Accumulate `sum_t a_t S_t` and `sum_t a_t D_t S_t`, with measured moments in place of estimates where there are.

    `S_t` is `pooled(C_t, Sbar_t)` of an expert whose inputs were measured, and the estimate `Sbar_t` of one whose
    inputs were not: both have the trace of `Sbar_t`, so that neither kind outweighs the other. The `m` rows of an
    update of full rank count as `m` inputs, those of adapters as none: they are combinations of a few.

    Until they are solved, and whatever the number of experts, at most four `[n, n]` and four `[m, n]` working-dtype
    buffers are alive at once beyond the inputs.

    Source: Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models" (RegMean), arXiv:2212.09849,
    Eq. 3, for the solve; its constant shrinkage of the off-diagonal entries is estimated here.

    Args:
        task_vectors: at least one expert.
        options: which estimate.
        decision: whether second moments are divided by their traces.
    """
    m, n = task_vectors.buffer_shape
    system, numerator = task_vectors.zeros(n, n), task_vectors.zeros(m, n)
    moments = []
    rank = low_rank_share(task_vectors) if decision.low_rank is None else decision.low_rank
    samples = (1 - rank) * task_vectors.shape[0]
    for t, share in enumerate(task_vectors.shares):
        rows = task_vectors.task_vector(t)
        proxy = gram(rows)
        squared = squared_norm(proxy) if options.needs_moment_norms else None
        moment = regularize(task_vectors, t, options, decision, squared=squared)
        add_to_diagonal_(proxy.mul_(moment.scale), moment.ridge)
        measured = task_vectors.experts[t].measured
        if measured is not None:
            proxy = pooled(measured, proxy, samples=samples)
        weighted = rows @ proxy
        moments.append(replace(moment, response=inner_product(rows, weighted)))
        system.add_(proxy, alpha=share)
        numerator.add_(weighted, alpha=share)
    return DenseEquations(
        name=task_vectors.name,
        system=system,
        numerator=numerator,
        prior_row=None,
        ones=None,
        residual=None,
        keep_numerator=options.bounds.asks_for_retention,
        moments=tuple(moments),
        correlation=None,
    )


def pooled(measured: MeasuredMoment, estimate: Tensor, *, samples: float) -> Tensor:
    """A measured second moment and the estimate of it, each counted by the inputs that it is the mean of.

        S   = (N S_C + M E) / (N + M)
        S_C = (tr E / tr C) V ((1 - r) V^-1 C V^-1 + r W^-1 E W^-1) V,    V^2 = diag(C),  W^2 = diag(E)

    Prompts are seldom what an expert was trained on in its whole breadth, and no sampling error shows that; its update
    is. In `S_C` the diagonal of `C` is kept: `n` numbers are well known from few tokens, while `n^2 / 2` correlations
    are not. `r` is the share of `C`'s off-diagonal energy that is sampling error, the intensity that minimizes the
    expected squared error (Schafer and Strimmer 2005). Where the estimate is all but the identity, as that of adapters
    is, the target is the diagonal, as theirs.

    Args:
        measured: `C = F^T F`, `r` and `N`.
        estimate: `E`, `[n, n]`, positive definite; overwritten.
        samples: `M`, the inputs that the estimate counts as.

    Returns:
        `[n, n]`, positive definite, with the trace of the estimate.
    """
    moment = gram(measured.factor.to(estimate))
    # Inputs that no token made differ from zero would leave the system singular.
    diagonal = torch.diagonal(moment)
    diagonal.clamp_(min=torch.finfo(moment.dtype).eps * float(diagonal.mean()))
    if not float(diagonal.sum()) > 0:
        return estimate
    share = samples / (samples + measured.tokens)
    moment.mul_(float(torch.diagonal(estimate).sum()) / float(diagonal.sum()))
    scales = (diagonal / torch.diagonal(estimate)).sqrt()
    moment.mul_((1 - share) * (1 - measured.error))
    parts = blocks(estimate)  # so that no further [n, n] buffer is needed
    for part, own in zip(parts, torch.split(scales, len(parts[0])), strict=True):
        part.mul_(torch.outer(own, scales).mul_((1 - share) * measured.error).add_(share))
    return moment.add_(estimate)
