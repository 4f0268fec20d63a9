"""TSV-Merge, Gargiulo et al., "Task Singular Vectors", arXiv:2412.00081, Algorithm 1."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.reference.subspace import polar_factor, truncated
from tests.reference.weights import participants


def tsv_m(
    task_vectors: Sequence[Tensor], weights: Sequence[float] | None = None, dtype: torch.dtype = torch.float64
) -> Tensor:
    """`polar([U_1 .. U_T]) diag(s_1 .. s_T) polar([V_1 .. V_T])^T`, each of the top `floor(r / T)` triples, `[m, n]`.

    `r = min(m, n)`; with more experts than that, one triple each. A weight scales its expert's singular values.
    """
    D, a = participants(task_vectors, weights, dtype)
    if not D:
        return torch.zeros_like(task_vectors[0], dtype=dtype)
    if len(D) == 1:
        return D[0].clone()
    k = max(1, min(D[0].shape) // len(D))
    parts = [truncated(d, k) for d in D]
    U = torch.cat([u for u, _, _ in parts], dim=1)
    s = torch.cat([a_t * s for a_t, (_, s, _) in zip(a, parts, strict=True)])
    V = torch.cat([vh.T for _, _, vh in parts], dim=1)
    return polar_factor(U) @ torch.diag(s) @ polar_factor(V).T
