"""The normal equations where second moments of the experts' inputs were measured."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mergekit_ace.linalg.precision import inner_product, squared_norm
from mergekit_ace.linalg.symmetric import add_to_diagonal_, gram
from mergekit_ace.matrix.decision import Decision
from mergekit_ace.matrix.dense import DenseEquations
from mergekit_ace.matrix.expert import MeasuredMoment
from mergekit_ace.matrix.normal_equations import NormalEquations
from mergekit_ace.matrix.options import CovarianceOptions
from mergekit_ace.matrix.second_moment import regularize
from mergekit_ace.matrix.task_vectors import TaskVectors


def assemble_measured(task_vectors: TaskVectors, options: CovarianceOptions, decision: Decision) -> NormalEquations:
    """Accumulate `sum_t a_t S_t` and `sum_t a_t D_t S_t`, with measured moments in place of estimates where there are.

    `S_t` is `shrunk(C_t, Sbar_t)` of an expert whose inputs were measured, and the estimate `Sbar_t` of one whose
    inputs were not: both have the trace of `Sbar_t`, so that neither kind outweighs the other.

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
    for t, share in enumerate(task_vectors.shares):
        rows = task_vectors.task_vector(t)
        proxy = gram(rows)
        squared = squared_norm(proxy) if options.needs_moment_norms else None
        moment = regularize(task_vectors, t, options, decision, squared=squared)
        add_to_diagonal_(proxy.mul_(moment.scale), moment.ridge)
        measured = task_vectors.experts[t].measured
        if measured is not None:
            proxy = shrunk(measured, proxy)
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
        keep_numerator=options.bounds.retention,
        moments=tuple(moments),
        correlation=None,
    )


def shrunk(measured: MeasuredMoment, estimate: Tensor) -> Tensor:
    """The measured second moment with its correlations shrunk towards those of an estimate.

        S = (tr E / tr C) V ((1 - r) V^-1 C V^-1 + r W^-1 E W^-1) V,    V^2 = diag(C),  W^2 = diag(E)

    The diagonal of `C` is kept: `n` numbers are well known from few tokens, while `n^2 / 2` correlations are not. `r`
    is the share of `C`'s off-diagonal energy that is sampling error, the intensity that minimizes the expected squared
    error (Schafer and Strimmer 2005). Where the estimate is all but the identity, as that of adapters is, the target is
    the diagonal, as theirs.

    Args:
        measured: `C = F^T F` and `r`.
        estimate: `E`, `[n, n]`, positive definite; overwritten.

    Returns:
        `[n, n]`, with the trace of the estimate.
    """
    moment = gram(measured.factor.to(estimate))
    # Inputs that no token made differ from zero would leave the system singular.
    diagonal = torch.diagonal(moment)
    diagonal.clamp_(min=torch.finfo(moment.dtype).eps * float(diagonal.mean()))
    if not float(diagonal.sum()) > 0:
        return estimate
    total = float(torch.diagonal(estimate).sum())
    moment.mul_(total / float(diagonal.sum()))
    scales = (diagonal / torch.diagonal(estimate)).sqrt()
    estimate.mul_(scales[:, None]).mul_(scales)
    return moment.lerp_(estimate, measured.error)
