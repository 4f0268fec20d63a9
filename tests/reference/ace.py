"""ACE, step by step: Xu et al., "ACE-Merging", CVPR 2026, arXiv:2603.02945v2, equations as numbered there.

`D_t` is the task vector of expert t, `[m, n]`; `a_t` its weight, normalized to mean 1, which multiplies the expert's
share of every sum over t. Equal weights are the published method.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.reference.subspace import top_isometry
from tests.reference.weights import participants


@dataclass(frozen=True, kw_only=True)
class AceOptions:
    """The published settings; `epsilon` is the authors' program's default."""

    epsilon: float = 1e-2
    heterogeneity_threshold: float = 0.3
    spectral_fraction: float = 0.3
    structural_prior: bool = True


PUBLISHED = AceOptions()


def heterogeneity(task_vectors: Sequence[Tensor], dtype: torch.dtype = torch.float64) -> float:
    """`gamma = Var(l) / Mean(l)^2` of `l_t = log ||D_t||_F^2`, unbiased variance (Eq. 7 / 43)."""
    logs = torch.stack([d.to(dtype).square().sum() for d in task_vectors]).log()
    return float(logs.var(correction=1) / logs.mean().square())


def is_heterogeneous(task_vectors: Sequence[Tensor], threshold: float, dtype: torch.dtype = torch.float64) -> bool:
    """The gate of steps 3, 4 and 6: a threshold of 0 always opens it, an infinite one never."""
    if threshold == 0:
        return True
    return heterogeneity(task_vectors, dtype) > threshold


def ace(
    task_vectors: Sequence[Tensor],
    options: AceOptions = PUBLISHED,
    weights: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float64,
    relative_rank: float | None = None,
) -> Tensor:
    """The merged task vector `W` of one layer, `[m, n]`, computed in `dtype`.

    Experts of weight 0 and experts whose task vector is zero are left out. None left: zeros. One left: its task
    vector. `relative_rank`: see `top_isometry`.
    """
    D, a = participants(task_vectors, weights, dtype)
    if not D:
        return torch.zeros_like(task_vectors[0], dtype=dtype)
    if len(D) == 1:
        return D[0].clone()
    T = len(D)
    m, n = D[0].shape
    identity = torch.eye(n, dtype=dtype)

    # 1. Heterogeneity, from the original task vectors (Eq. 7).
    e = [d.square().sum() for d in D]
    heterogeneous = is_heterogeneous(D, options.heterogeneity_threshold, dtype)

    # 2. Second-order proxy of the centered task vectors (Eqs. 5, 6).
    C = [d - d.mean(dim=0, keepdim=True) for d in D]
    G = [c.T @ c for c in C]

    # 3. Adaptive normalization and ridge (Eqs. 8-10).
    if heterogeneous:
        S = [g / g.trace() for g in G]
        ridge = [options.epsilon / g.trace() for g in G]
    else:
        S = G
        ridge = [torch.tensor(options.epsilon, dtype=dtype)] * T
    S_bar = [s + r * identity for s, r in zip(S, ridge, strict=True)]

    # 4. Collective structural prior (Eqs. 11-13), from the unregularized proxies.
    prior = torch.zeros(n, n, dtype=dtype)
    if options.structural_prior:
        c = sum(a_t * s for a_t, s in zip(a, S, strict=True)).mean(dim=0, keepdim=True)
        if heterogeneous:
            c = c / (sum(a_t * e_t for a_t, e_t in zip(a, e, strict=True)) / T)
        prior = c.expand(n, n)

    # 5. Preliminary merge (Eq. 14).
    numerator = sum(a_t * (c @ s) for a_t, c, s in zip(a, C, S_bar, strict=True))
    denominator = sum(a_t * s for a_t, s in zip(a, S_bar, strict=True)) + prior
    W0 = numerator @ torch.linalg.inv(denominator)

    # 6. Spectral refinement (Eqs. 15-19).
    k = math.floor(options.spectral_fraction * min(m, n))
    if not heterogeneous or k == 0:
        return W0
    S_mean = sum(a_t * s for a_t, s in zip(a, S_bar, strict=True)) / T
    R = sum(a_t * (d @ (s - S_mean)) for a_t, d, s in zip(a, D, S, strict=True))
    isometry, singular_values = top_isometry(R + W0, k, relative_rank)
    return W0 + singular_values.mean() * isometry
