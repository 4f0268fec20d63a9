"""WUDI-Merging, Cheng et al., "Whoever Started the Interference Should End It", arXiv:2503.08099."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.reference.weights import participants


def wudi_closed_form(
    task_vectors: Sequence[Tensor],
    ridges: float | Sequence[float] = 0.0,
    weights: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The minimizer of `sum_t a_t ||(X - D_t) D_t^T||_F^2 / ||D_t||_F^2`, `[m, n]`.

    `(sum_t a_t D_t N_t) (sum_t a_t N_t)^-1` with `N_t = D_t^T D_t / ||D_t||_F^2 + r_t I`.
    """
    D, a = participants(task_vectors, weights, dtype)
    if not D:
        return torch.zeros_like(task_vectors[0], dtype=dtype)
    if len(D) == 1:
        return D[0].clone()
    r = [ridges] * len(D) if isinstance(ridges, float) else list(ridges)
    identity = torch.eye(D[0].shape[1], dtype=dtype)
    N = [d.T @ d / d.square().sum() + r_t * identity for d, r_t in zip(D, r, strict=True)]
    numerator = sum(a_t * (d @ g) for a_t, d, g in zip(a, D, N, strict=True))
    return numerator @ torch.linalg.inv(sum(a_t * g for a_t, g in zip(a, N, strict=True)))


def wudi_adam(
    task_vectors: Sequence[Tensor],
    steps: int = 300,
    learning_rate: float = 1e-5,
    weights: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The same objective as published: Adam from `X = sum_t a_t D_t`, stopped after `steps`, `[m, n]`.

    Adam's own defaults (0.9, 0.999, 1e-8), written out; the gradient is `2 (X - D_t) D_t^T D_t / ||D_t||_F^2`.
    """
    D, a = participants(task_vectors, weights, dtype)
    if not D:
        return torch.zeros_like(task_vectors[0], dtype=dtype)
    if len(D) == 1:
        return D[0].clone()
    N = [d.T @ d / d.square().sum() for d in D]
    X = sum(a_t * d for a_t, d in zip(a, D, strict=True))
    first, second = torch.zeros_like(D[0]), torch.zeros_like(D[0])
    for step in range(1, steps + 1):
        gradient = sum(2 * a_t * ((X - d) @ g) for a_t, d, g in zip(a, D, N, strict=True))
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient.square()
        corrected = (second / (1 - 0.999**step)).sqrt() + 1e-8
        X = X - learning_rate * (first / (1 - 0.9**step)) / corrected
    return X


def wudi_flow(
    task_vectors: Sequence[Tensor],
    time: float = 300.0,
    start: str = "sum",
    weights: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Its gradient flow from the sum (or the mean) after a time, by the soft filter of arXiv:2606.07289, `[m, n]`.

    `X_0 - X_0 V f V^T + N V (f / l) V^T` with `C = sum_t a_t G_t / ||D_t||_F^2 = V l V^T` and `f = 1 - exp(-l s)`.
    """
    D, a = participants(task_vectors, weights, dtype)
    if not D:
        return torch.zeros_like(task_vectors[0], dtype=dtype)
    if len(D) == 1:
        return D[0].clone()
    G = [d.T @ d / d.square().sum() for d in D]
    C = sum(a_t * g for a_t, g in zip(a, G, strict=True))
    N = sum(a_t * (d @ g) for a_t, d, g in zip(a, D, G, strict=True))
    X0 = sum(a_t * d for a_t, d in zip(a, D, strict=True))
    if start == "average":
        X0 = X0 / len(D)
    values, V = torch.linalg.eigh(C)
    f = torch.where(values > 1e-13, 1 - torch.exp(-values * time), 0.0)
    quotient = torch.where(values > 1e-13, f / values, 0.0)
    return X0 - X0 @ V @ torch.diag(f) @ V.T + N @ V @ torch.diag(quotient) @ V.T
