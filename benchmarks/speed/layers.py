"""Layers to merge: real shapes, made-up weights whose updates look like real ones.

Measured on fine-tunes of a 384-wide encoder, the singular values of an update fall as about `(1 + 77 i / r)^-0.8` from
the first to the last of `r = min(m, n)`, and its norm is 0.5 to 2 percent of the base's. Both hold here.
"""

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

BASE_RMS = 0.05
# Cycled over the experts; their spread is that of real fine-tunes.
RELATIVE_SIZES = (0.012, 0.014, 0.005, 0.010, 0.017, 0.008, 0.013, 0.006)
ADAPTER_RANK = 16


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One linear weight `[m, n]` of a model."""

    model: str
    m: int
    n: int

    @property
    def name(self) -> str:
        return f"{self.m}x{self.n}"


TABLE = (
    Shape(model="GPT-2", m=2304, n=768),
    Shape(model="GPT-2", m=768, n=3072),
    Shape(model="ViT-L/14", m=4096, n=1024),
    Shape(model="ViT-L/14", m=1024, n=4096),
)
"""The shapes that the targets are stated for."""

SMALL = (
    *TABLE,
    Shape(model="GPT-2", m=768, n=768),
    Shape(model="GPT-2", m=3072, n=768),
    Shape(model="ViT-L/14", m=1024, n=1024),
)
LARGE = (
    Shape(model="Llama-3.2-3B", m=1024, n=3072),
    Shape(model="Llama-3.2-3B", m=3072, n=3072),
    Shape(model="Llama-3.2-3B", m=8192, n=3072),
    Shape(model="Llama-3.2-3B", m=3072, n=8192),
)
"""With three experts only: with more, the literal steps do not fit a small machine's memory."""


def parse_shape(text: str) -> Shape:
    """`2304x768`, of a model above where one has it.

    Raises:
        ValueError: another form.
    """
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise ValueError(f"a shape must be two numbers like 2304x768; got {text!r}")
    m, n = map(int, match.groups())
    return next((shape for shape in (*SMALL, *LARGE) if (shape.m, shape.n) == (m, n)), Shape(model="other", m=m, n=n))


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Float32 checkpoints of one weight: what a merge starts from."""

    base: Tensor
    experts: tuple[Tensor, ...]


def fine_tuned(shape: Shape, experts: int, device: str = "cpu") -> Layer:
    """Full fine-tunes: every update `U diag(s) V^T` with nearly orthogonal random factors and a steep spectrum."""
    rank = min(shape.m, shape.n)
    spectrum = (1 + 77 * torch.arange(rank) / rank) ** -0.8
    return _made(shape, experts, spectrum, device)


def adapted(shape: Shape, experts: int, device: str = "cpu") -> Layer:
    """LoRA adapters of rank 16, merged into the base and stored in float32."""
    return _made(shape, experts, torch.ones(ADAPTER_RANK), device)


def _made(shape: Shape, experts: int, spectrum: Tensor, device: str) -> Layer:
    generator = torch.Generator().manual_seed(0)
    base = BASE_RMS * torch.randn(shape.m, shape.n, generator=generator)
    made = []
    for t in range(experts):
        left = torch.randn(shape.m, len(spectrum), generator=generator)
        update = (left * spectrum) @ torch.randn(len(spectrum), shape.n, generator=generator)
        size = RELATIVE_SIZES[t % len(RELATIVE_SIZES)] * BASE_RMS * math.sqrt(shape.m * shape.n)
        made.append(update.mul_(size / update.norm()).add_(base).to(device))
    return Layer(base=base.to(device), experts=tuple(made))
