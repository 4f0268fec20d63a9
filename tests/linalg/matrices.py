"""Matrices of a chosen condition number, rank or spectrum; float64, seeded."""

import torch
from torch import Tensor


def _orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64, generator=generator)).Q


def spd(size: int, *, condition: float, seed: int = 0) -> Tensor:
    """`[size, size]`, eigenvalues evenly spaced on a logarithmic scale from 1 down to `1 / condition`."""
    vectors = _orthonormal(size, size, seed)
    return (vectors * torch.logspace(0, -torch.tensor(condition).log10().item(), size, dtype=torch.float64)) @ vectors.T


def of_spectrum(m: int, n: int, values: Tensor, *, seed: int = 0) -> Tensor:
    """`[m, n]` of these singular values, all others zero."""
    return (_orthonormal(m, len(values), seed) * values) @ _orthonormal(n, len(values), seed + 1).T


def of_rank(m: int, n: int, rank: int, *, seed: int = 0, decay: float = 1.0) -> Tensor:
    """`[m, n]` of exactly that rank; the i-th singular value is `i ** -decay`."""
    return of_spectrum(m, n, torch.arange(1, rank + 1, dtype=torch.float64) ** -decay, seed=seed)
