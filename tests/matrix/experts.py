"""Experts of one layer with task vectors of a chosen form; float64, seeded."""

import torch
from torch import Tensor

from mergekit_ace.matrix.expert import Expert
from mergekit_ace.matrix.stored_task_vectors import StoredTaskVectors
from mergekit_ace.matrix.task_vectors import TaskVectors
from tests.linalg.matrices import of_rank


def steep_updates(m: int, n: int, count: int, *, spread: float = 1.0) -> list[Tensor]:
    """Full-rank task vectors with a power-law spectrum and a mean row; each is `spread` times the one before."""
    rank = min(m, n)
    generator = torch.Generator().manual_seed(7)
    return [
        spread**t * (of_rank(m, n, rank, seed=10 * t) + 0.05 * torch.randn(n, generator=generator, dtype=torch.float64))
        for t in range(count)
    ]


def related_updates(m: int, n: int, count: int, *, spread: float = 1.0) -> list[Tensor]:
    """Full-rank task vectors whose rows have one steep covariance, as those of experts of one base nearly do."""
    generator = torch.Generator().manual_seed(11)
    root = of_rank(n, n, n, seed=5)
    return [
        spread**t * torch.randn(m, n, generator=generator, dtype=torch.float64) @ root / m**0.5 for t in range(count)
    ]


def adapter_updates(m: int, n: int, count: int, *, rank: int) -> list[Tensor]:
    """Task vectors of low rank, all of one size."""
    return [of_rank(m, n, rank, seed=10 * t, decay=0.5) for t in range(count)]


def layer(updates: list[Tensor], *, dtype: torch.dtype = torch.float64, base_scale: float = 0.1) -> TaskVectors:
    """Experts around a random base."""
    generator = torch.Generator().manual_seed(3)
    base = base_scale * torch.randn(updates[0].shape, generator=generator, dtype=torch.float64)
    experts = [Expert(name=f"expert {t}", tensor=(base + update).to(dtype)) for t, update in enumerate(updates)]
    return StoredTaskVectors(base.to(dtype), experts, name="layers.0.up_proj.weight")


def in_float64(task_vectors: TaskVectors) -> list[Tensor]:
    """The same differences, taken in float64 from what is stored."""
    return [expert.tensor.double() - task_vectors.base.double() for expert in task_vectors.experts]
