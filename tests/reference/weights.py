"""Which experts take part in a layer, and with which weight."""

from collections.abc import Sequence

import torch
from torch import Tensor


def participants(
    task_vectors: Sequence[Tensor], weights: Sequence[float] | None, dtype: torch.dtype
) -> tuple[list[Tensor], list[float]]:
    """The task vectors that are not zero, of the experts whose weight is not 0, and their weights at mean 1."""
    weights = [1.0] * len(task_vectors) if weights is None else list(weights)
    kept = [(d.to(dtype), w) for d, w in zip(task_vectors, weights, strict=True) if w > 0 and bool(d.any())]
    mean = sum(w for _, w in kept) / max(len(kept), 1)
    return [d for d, _ in kept], [w / mean for _, w in kept]
