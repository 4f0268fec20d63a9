"""Other parametrizations of an update as low-rank factors, where they are that exactly.

| kind | its update | as factors |
| --- | --- | --- |
| LoRA | `s B A` | `s B`, `A` |
| AdaLoRA | `s B diag(E) A / (r + 1e-5)` | `s B diag(E) / (r + 1e-5)`, `A` |
| LoHa | `s (W1a W1b) * (W2a W2b)`, entrywise | rank `r^2`: products of the columns, products of the rows |
| LoKr | `s kron(W1, W2)` | `kron` of the left factors, `kron` of the right ones |
| a kernel by CP (`lora_mid`) | `s up (mid x down)` | `s up`, the kernel through `down` |

All others need the base's weights, or at least its shapes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mergekit_ace.linalg.factors import Factors
from mergekit_ace.linalg.precision import working_dtype

Parts = Mapping[str, Tensor]
# peft divides by the rank plus this, so that a rank of zero is no division by zero.
_ADALORA_OFFSET = 1e-5


def widened(tensor: Tensor) -> Tensor:
    """A factor in the precision that products are taken in."""
    return tensor.detach().to(working_dtype(tensor.dtype))


def from_lora(down: Tensor, up: Tensor, scale: float) -> Factors:
    """`scale * up @ down`; kernels are flattened, a kernel of `up` is 1 by 1.

    Args:
        down: `[r, n]` or `[r, in, *kernel]`.
        up: `[m, r]` or `[m, r, 1, ..]`.
        scale: of the product.
    """
    return Factors(left=widened(up).flatten(1).mul(scale), right=widened(down).flatten(1))


def from_stack(down: Tensor, up: Tensor, scale: float, *, experts: int) -> Factors:
    """Adapters of stacked experts: `D_e = scale * up_e @ down_e` for each expert.

    Args:
        down: `[E r, n]`, the experts' rows one block after the other.
        up: `[m, r E]`, the experts' columns taking turns.
        scale: of the products.
        experts: `E`.
    """
    right = widened(down).reshape(experts, -1, down.shape[1])
    left = widened(up).reshape(up.shape[0], -1, experts).permute(2, 0, 1)
    return Factors(left=left.mul(scale), right=right)


def to_stack(factors: Factors) -> tuple[Tensor, Tensor]:
    """`down`, `up` as peft stores them: the inverse of `from_stack` with a scale of 1."""
    experts, rank, n = factors.right.shape
    down = factors.right.reshape(experts * rank, n)
    up = factors.left.permute(1, 2, 0).reshape(factors.left.shape[1], rank * experts)
    return down, up


def from_adalora(down: Tensor, up: Tensor, singular_values: Tensor, alpha: float) -> Factors:
    """AdaLoRA: singular vectors and values, of the rank that was kept.

    Args:
        down: `[r, n]`.
        up: `[m, r]`.
        singular_values: `[r, 1]`.
        alpha: as configured; where it is not positive, peft takes the rank.
    """
    rank = down.shape[0]
    scale = (alpha if alpha > 0 else float(rank)) / (rank + _ADALORA_OFFSET)
    return Factors(left=widened(up) * widened(singular_values).flatten().mul(scale), right=widened(down))


def from_loha(parts: Parts, scale: float) -> Factors:
    """LoHa: the entrywise product of two matrices of rank `r` has rank `r^2`.

    Column `i r + j` of `left` is the product of column `i` of `W1a` and column `j` of `W2a`; rows of `right` likewise.
    """
    first_left, second_left = widened(parts["hada_w1_a"]), widened(parts["hada_w2_a"])
    first_right, second_right = widened(parts["hada_w1_b"]), widened(parts["hada_w2_b"])
    left = torch.einsum("mi,mj->mij", first_left, second_left).flatten(1)
    right = torch.einsum("in,jn->ijn", first_right, second_right).flatten(0, 1)
    return Factors(left=left.mul_(scale), right=right)


def loha_rank(parts: Mapping[str, tuple[int, ...]]) -> int:
    """Rank of `from_loha`, by the shapes."""
    return parts["hada_w1_a"][1] * parts["hada_w2_a"][1]


def from_lokr(parts: Parts, scale: float) -> Factors:
    """LoKr: `kron(L1 R1, L2 R2) = kron(L1, L2) kron(R1, R2)`.

    A matrix that is stored whole is one factor, and the identity of its smaller side the other.
    """
    first_left, first_right = _split(parts, "lokr_w1")
    second_left, second_right = _split(parts, "lokr_w2")
    return Factors(
        left=torch.kron(first_left.contiguous(), second_left.contiguous()).mul_(scale),
        right=torch.kron(first_right.contiguous(), second_right.contiguous()),
    )


def lokr_shape(parts: Mapping[str, tuple[int, ...]]) -> tuple[int, int, int]:
    """`(m, n, rank)` of `from_lokr`, by the shapes."""
    m = n = rank = 1
    for name in ("lokr_w1", "lokr_w2"):
        if name in parts:
            rows, columns = parts[name]
            inner = min(rows, columns)
        else:
            rows, inner = parts[f"{name}_a"]
            columns = parts[f"{name}_b"][1]
        m, n, rank = m * rows, n * columns, rank * inner
    return m, n, rank


def from_cp_kernel(down: Tensor, mid: Tensor, up: Tensor, scale: float) -> Factors:
    """A convolution's kernel by CP: `sum_ij up[:, i] mid[i, j, ..] down[j, :]`.

    Args:
        down: `[r, in, 1, ..]`.
        mid: `[r, r, *kernel]`.
        up: `[m, r, 1, ..]`.
        scale: of the product.
    """
    inputs = widened(down).flatten(1)
    kernel = torch.einsum("ij...,jn->in...", widened(mid), inputs)
    return Factors(left=widened(up).flatten(1).mul(scale), right=kernel.flatten(1))


def _split(parts: Parts, name: str) -> tuple[Tensor, Tensor]:
    if name not in parts:
        return widened(parts[f"{name}_a"]), widened(parts[f"{name}_b"])
    whole = widened(parts[name])
    rows, columns = whole.shape
    if columns <= rows:
        return whole, torch.eye(columns, dtype=whole.dtype, device=whole.device)
    return torch.eye(rows, dtype=whole.dtype, device=whole.device), whole
