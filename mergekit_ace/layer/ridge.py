"""How much of a second moment is replaced by a multiple of the identity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Regularized:
    """`Sbar = scale * G + ridge * I`, the regularized second-order proxy of one expert, by its scalars."""

    scale: float
    ridge: float
    trace: float
    """`tr G`."""
    squared_norm: float | None = None
    """`tr(G^2) = ||G||_F^2`, where something asked for it."""


def relative_ridge(proxies: Sequence[Regularized], shares: Sequence[float], dimensions: int) -> float:
    """Ridge of `sum_t a_t Sbar_t` over the mean eigenvalue of `sum_t a_t scale_t G_t`; infinite where that is zero.

    Args:
        proxies: of any number of experts.
        shares: `a_t`, one for each.
        dimensions: `n`.
    """
    ridge = sum(share * proxy.ridge for share, proxy in zip(shares, proxies, strict=True))
    trace = sum(share * proxy.scale * proxy.trace for share, proxy in zip(shares, proxies, strict=True))
    return ridge * dimensions / trace if trace > 0 else float("inf")


def fixed_ridge(epsilon: float, *, trace: float, normalize: bool) -> Regularized:
    """`G + eps I`, or trace-normalized `(G + eps I) / tr G` (ACE, arXiv:2603.02945, Eqs. 8-10).

    Args:
        epsilon: the ridge, in units of `G`.
        trace: `tr G`, positive when `normalize`.
        normalize: divide by the trace.
    """
    unit = 1 / trace if normalize else 1.0
    return Regularized(scale=unit, ridge=epsilon * unit, trace=trace)


def shrunk_ridge(
    *, trace: float, squared_norm: float, samples: int, dimensions: int, normalize: bool, least: float = 0.0
) -> Regularized:
    """Oracle-approximating shrinkage: `(1 - rho) G + rho (tr G / n) I`, which keeps the trace; no constant to choose.

    The rows of a task vector are samples of the layer's input directions; their second moment over few rows has
    eigenvalues spread far wider than the true ones. `rho` minimizes the expected squared error of the convex
    combination, with the unknown covariance replaced by its own estimate until nothing changes:

        rho = min(1, ((1 - 2/n) tr(G^2) + tr(G)^2) / ((m + 1 - 2/n) (tr(G^2) - tr(G)^2 / n)))

    It does not change when `G` is multiplied by a constant. Source: Chen, Wiesel, Eldar, Hero, "Shrinkage algorithms
    for MMSE covariance estimation", IEEE Trans. Signal Processing 58(10), 2010, Eq. 23.

    Args:
        trace: `tr G`, positive.
        squared_norm: `tr(G^2) = ||G||_F^2`.
        samples: `m`, independent rows.
        dimensions: `n`.
        normalize: divide by the trace.
        least: smallest `rho`, for rows that are known to be no independent samples.
    """
    spread = squared_norm - trace**2 / dimensions
    intensity = 1.0
    if spread > 0:
        numerator = (1 - 2 / dimensions) * squared_norm + trace**2
        intensity = min(1.0, numerator / ((samples + 1 - 2 / dimensions) * spread))
    intensity = max(intensity, least)
    unit = 1 / trace if normalize else 1.0
    return Regularized(
        scale=(1 - intensity) * unit,
        ridge=intensity * trace / dimensions * unit,
        trace=trace,
        squared_norm=squared_norm,
    )
