"""Strategies: experts of one tensor with every defect that a checkpoint may have."""

from dataclasses import dataclass

import hypothesis.strategies as st
import torch
from torch import Tensor

DEFECTS = (
    "full",
    "low rank",
    "equal rows",
    "equal columns",
    "one entry",
    "zero",
    "copy",
    "opposite",
    "subnormal",
    "ill-conditioned",
)
LAYOUTS = ("contiguous", "transposed", "strided", "expanded rows")


@dataclass(frozen=True)
class Case:
    """A base and its experts, with what they were made of."""

    base: Tensor
    experts: list[Tensor]
    description: str

    @property
    def rounding(self) -> float:
        """Frobenius norm of what rounding to the dtype may change in a tensor of the inputs' size."""
        size = max(float(torch.linalg.vector_norm(x.double())) for x in (self.base, *self.experts))
        tiny = torch.finfo(self.base.dtype).tiny * self.base.numel() ** 0.5
        return 4 * torch.finfo(self.base.dtype).eps * size + tiny

    @property
    def updates(self) -> list[Tensor]:
        return [expert.double() - self.base.double() for expert in self.experts]


def _update(defect: str, shape: tuple[int, int], generator: torch.Generator, before: Tensor | None) -> Tensor:
    m, n = shape
    full = torch.randn(m, n, generator=generator, dtype=torch.float64)
    if defect == "low rank":
        return full[:, :1] @ torch.randn(1, n, generator=generator, dtype=torch.float64)
    if defect == "equal rows":
        return full[:1].expand(m, n)
    if defect == "equal columns":
        return full[:, :1].expand(m, n)
    if defect == "one entry":
        single = torch.zeros(m, n, dtype=torch.float64)
        single[m // 2, n // 2] = 1.0
        return single
    if defect == "zero":
        return torch.zeros(m, n, dtype=torch.float64)
    if defect == "copy" and before is not None:
        return before
    if defect == "opposite" and before is not None:
        return -before
    if defect == "subnormal":
        return full * 1e-42
    if defect == "ill-conditioned":
        return full * torch.logspace(0, -12, n, dtype=torch.float64)
    return full


def _laid_out(tensor: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        return tensor.T.contiguous().T
    if layout == "strided":
        return torch.stack([tensor, tensor], dim=-1)[..., 0]
    if layout == "expanded rows" and bool((tensor == tensor[:1]).all()):
        return tensor[:1].expand(tensor.shape)
    return tensor


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """1 to 32 experts of a matrix, scales from 1e-8 to 1e4, in every dtype and layout."""
    shape = (draw(st.integers(1, 20)), draw(st.integers(1, 20)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    defects = draw(st.lists(st.sampled_from(DEFECTS), min_size=1, max_size=draw(st.sampled_from([1, 2, 4, 32]))))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    base_scale = 10.0 ** draw(st.sampled_from([-8, -2, 0, 2]))
    base = base_scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    experts, before = [], None
    for defect in defects:
        scale = 10.0 ** draw(st.integers(-8, 4))
        update = _update(defect, shape, generator, before)
        before = update if defect in ("copy", "opposite") else scale * update
        layout = draw(st.sampled_from(LAYOUTS))
        experts.append(_laid_out((base + before).to(dtype), layout))
    return Case(base=base.to(dtype), experts=experts, description=f"{shape} {dtype} {defects}")
