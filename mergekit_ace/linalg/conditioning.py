"""How well conditioned a system is, from its Cholesky factor and without an eigendecomposition."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mergekit_ace.linalg.random_draws import normal_numbers

_STEPS = 24


def condition_number(factor: Tensor, *, steps: int = _STEPS) -> float:
    """Estimate `lambda_max / lambda_min` of `L L^T` by Lanczos iterations on it and on its inverse.

    Every step is two products or two triangular solves, `O(n^2)`. Ritz values lie inside the spectrum, so the estimate
    is never too large; with at least `n` steps it is exact to rounding.

    Args:
        factor: lower Cholesky factor `L`, `[n, n]`, as of `cholesky_factor`.
        steps: of each iteration.
    """
    return largest_eigenvalue(factor, steps=steps) * _largest_ritz_value(lambda x: _solve(factor, x), factor, steps)


def largest_eigenvalue(factor: Tensor, *, steps: int = _STEPS) -> float:
    """Estimate `lambda_max` of `L L^T` by Lanczos iterations, `O(n^2)` each; never too large.

    Args:
        factor: lower Cholesky factor `L`, `[n, n]`.
        steps: how many.
    """
    return _largest_ritz_value(lambda x: factor @ (factor.mT @ x), factor, steps)


def _solve(factor: Tensor, x: Tensor) -> Tensor:
    half: Tensor = torch.linalg.solve_triangular(factor, x, upper=False)
    solved: Tensor = torch.linalg.solve_triangular(factor.mT, half, upper=True)
    return solved


def _largest_ritz_value(apply: Callable[[Tensor], Tensor], like: Tensor, steps: int) -> float:
    n = like.shape[0]
    # A fixed start, so that the same merge reports the same number; random, so that no eigenvector is orthogonal to it.
    vector = normal_numbers(n, 1, like=like)
    basis = [vector / vector.norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    for _ in range(min(n, steps)):
        image = apply(basis[-1])
        diagonal.append(float((basis[-1] * image).sum()))
        known = torch.cat(basis, dim=1)
        # Twice: once leaves rounding in the directions found first, which would then be found again.
        image = image - known @ (known.mT @ image)
        image = image - known @ (known.mT @ image)
        length = float(image.norm())
        if length <= torch.finfo(like.dtype).eps * max(diagonal):
            break
        beside.append(length)
        basis.append(image / length)
    size = len(diagonal)
    tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64, device="cpu"))
    off = torch.tensor(beside[: size - 1], dtype=torch.float64, device="cpu")
    tridiagonal = tridiagonal + torch.diag(off, 1) + torch.diag(off, -1)
    return float(torch.linalg.eigvalsh(tridiagonal)[-1])
