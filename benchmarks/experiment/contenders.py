"""Formulas of other data-free methods that neither mergekit nor this package has, for comparison alone.

Each takes the task vectors `D_t` of one `[m, n]` weight and returns the merged one. Written plainly: no claim on memory
or time. Core Space (arXiv:2509.17786) needs none: `tsv_m` and `iso_c` give on cores what they give on matrices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Of the largest singular value; less is rounding.
_RANK = 1e-5


def calibrated_sum(D: Sequence[Tensor], *, least: float = 0.1) -> Tensor:
    """Singular Value Calibration of task arithmetic: singular values divided by how far they exceed the experts'.

        U diag(g s) V^T of X = sum_t D_t = U diag(s) V^T,    g_r = T / sum_t max(0.1, <a_r, a_rt> / ||a_rt||^2)

    with `a_r = u_r^T X`, `a_rt = u_r^T D_t`. Source: arXiv:2602.05536.
    """
    left, values, right = _svd(torch.stack(list(D)).sum(dim=0))
    whole = values[:, None] * right
    total = torch.zeros_like(values)
    for d in D:
        own = left.mT @ d
        squares = own.square().sum(dim=1).clamp_min(torch.finfo(own.dtype).tiny)
        total += ((own * whole).sum(dim=1) / squares).clamp_min(least)
    return left * (len(D) / total * values) @ right


def consensus_sum(D: Sequence[Tensor], *, threshold: float = 0.4, agreeing: int = 2) -> Tensor:
    """The sum of the task vectors where at least two tasks claim the entry (Consensus task arithmetic).

    Task `t` claims an entry where `|D_t| > l |sum D - D_t|`. Source: arXiv:2405.07813, which chooses `l` from 0.2 to
    0.6 for each task by validation data; data-free it is one number.
    """
    total = torch.stack(list(D)).sum(dim=0)
    claims = torch.stack([d.abs() > threshold * (total - d).abs() for d in D])
    return torch.where(claims.sum(dim=0) >= agreeing, total, 0.0)


def norm_weighted_mean(D: Sequence[Tensor], *, exponent: float) -> Tensor:
    """`sum_t ||D_t||^k D_t / sum_t ||D_t||^k`, norms of this weight alone.

    `k = 2`: MetaGPT (arXiv:2406.11385) takes the norms of whole models, `k = -1`: NAN (arXiv:2505.16148), any: FroM
    (arXiv:2506.02478).
    """
    weights = torch.tensor([float(torch.linalg.vector_norm(d)) ** exponent for d in D])
    weights /= weights.sum()
    return torch.stack([float(w) * d for w, d in zip(weights, D, strict=True)]).sum(dim=0)


def knots_ties(D: Sequence[Tensor], *, density: float = 0.2) -> Tensor:
    """TIES of the experts' shares in common left directions: `[D_1 .. D_T] = U S [V_1 .. V_T]^T`, `U ties(S V_t^T)`.

    Source: KnOTS, arXiv:2410.19735; TIES, arXiv:2306.01708: trim to the largest entries, elect a sign by their sum,
    mean of those that have it.
    """
    left, values, right = _svd(torch.cat(list(D), dim=1))
    parts = torch.stack((values[:, None] * right).split([d.shape[1] for d in D], dim=1))
    flat = parts.flatten(1)
    kept = max(1, int(density * flat.shape[1]))
    thresholds = flat.abs().topk(kept, dim=1).values[:, -1:]
    trimmed = torch.where(flat.abs() >= thresholds, flat, 0.0)
    agree = (trimmed.sign() == trimmed.sum(dim=0).sign()) & (trimmed != 0)
    merged = (trimmed * agree).sum(dim=0) / agree.sum(dim=0).clamp_min(1)
    return left @ merged.view(parts.shape[1:])


def regression_mean(D: Sequence[Tensor], C: Sequence[Tensor], *, kept: float = 0.9) -> Tensor:
    """RegMean: `(sum_t D_t S_t) (sum_t S_t)^-1`, with `S_t` the sum `C_t` of an expert's inputs' squares `x x^T`.

    Off the diagonal nine tenths of it are kept. Not data-free. Source: arXiv:2212.09849, Eq. 3 and its section 3.2.
    """
    moments = [kept * c + (1 - kept) * torch.diag(c.diagonal()) for c in C]
    system = torch.stack(moments).sum(dim=0)
    # inputs that are always zero
    system.diagonal().clamp_(min=torch.finfo(system.dtype).eps * float(system.diagonal().mean()))
    numerator = torch.stack([d @ s for d, s in zip(D, moments, strict=True)]).sum(dim=0)
    return torch.linalg.solve(system, numerator, left=False)


def robust_factors(
    A: Sequence[Tensor], B: Sequence[Tensor], *, density: float = 0.2, weight: float = 2.0, floor: float = 0.8
) -> tuple[Tensor, Tensor]:
    """RobustMerge: A `[r, n]` and B `[m, r]` of equal ranks, pruned and joined apart, B by what pruning took from A.

        A = w sum_t A'_t,    B = w sum_t s_t B'_t / sum_t s_t,    s_t = sum_columns |A_t| / sum_columns |A'_t|

    A prime keeps a fifth of the entries, the largest; the `r` entries of `s_t` are at least their own 80th percentile.
    Source: arXiv:2502.17159 and the authors' program, whose constants these are.
    """
    down, up, scales = [], [], []
    for a, b in zip(A, B, strict=True):
        kept = _largest(a, density)
        left = kept.abs().sum(dim=1)
        # a row of which nothing is kept counts as it is
        scale = torch.where(left > 0, a.abs().sum(dim=1) / left, 1.0)
        scales.append(scale.clamp_min(scale.sort().values[int(floor * len(scale))]))
        down.append(kept)
        up.append(scales[-1] * _largest(b, density))
    return weight * torch.stack(down).sum(dim=0), weight * torch.stack(up).sum(dim=0) / torch.stack(scales).sum(dim=0)


def _largest(matrix: Tensor, density: float) -> Tensor:
    """Its largest entries, the others zero."""
    threshold = matrix.abs().flatten().kthvalue(int((1 - density) * matrix.numel())).values
    return torch.where(matrix.abs() >= threshold, matrix, 0.0)


def spectral_truncated_mean(D: Sequence[Tensor], *, share: float = 0.4) -> Tensor:
    """The mean of the task vectors' top singular directions, up to a share of the nuclear norm, which they keep (STAR).

    Source: arXiv:2502.10339, at its 40 percent.
    """
    parts = []
    for d in D:
        left, values, right = _svd(d)
        kept = int((values.cumsum(0) < share * values.sum()).sum()) + 1
        longer = values.sum() / values[:kept].sum()
        parts.append(left[:, :kept] * (longer * values[:kept]) @ right[:kept])
    return torch.stack(parts).mean(dim=0)


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    kept = max(1, int((values > _RANK * values[:1]).sum()))
    return left[:, :kept], values[:kept], right[:kept]
