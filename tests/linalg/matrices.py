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


def of_rank(m: int, n: int, rank: int, *, seed: int = 0, decay: float = 1.0) -> Tensor:
    """`[m, n]` of exactly that rank; the i-th singular value is `i ** -decay`."""
    values = torch.arange(1, rank + 1, dtype=torch.float64) ** -decay
    return (_orthonormal(m, rank, seed) * values) @ _orthonormal(n, rank, seed + 1).T
