"""What is compared. Every contender starts from the checkpoints' tensors and ends with the merged task vector `[m, n]`.

The matrix-product floor is the exception: it starts from the task vectors, and its products are no merge. It is, per
expert, the symmetric product that the `[n, n]` system needs, `D^T D`, and the one numerator product: `D (D^T D)` where
`m >= n`, and `(D D^T) D` with its smaller Gram matrix where `m < n`. All are full products by `torch.mm`, with no
symmetry used, no sums, no solve.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.speed.layers import Layer
from mergekit_ace.matrix.expert import Expert
from mergekit_ace.matrix.merge import merge_by_covariance
from mergekit_ace.matrix.options import Gate
from mergekit_ace.matrix.peers.wudi_flow import flow_interference
from mergekit_ace.matrix.presets import ACE, ACE_PUBLISHED, with_epsilon
from mergekit_ace.matrix.stored_task_vectors import StoredTaskVectors
from tests.reference import AceOptions, ace, iso_c, iso_cts, tsv_m, wudi_adam

Merge = Callable[[], Tensor]

# What the authors set for RoBERTa. At the updates' real size their other value, 1e-2, exceeds every eigenvalue of the
# system: any solver would look exact.
EPSILON = 1e-5
PUBLISHED = with_epsilon(ACE_PUBLISHED, EPSILON)
OPTIONS = {
    "homogeneous": replace(PUBLISHED, gate=Gate(statistic="published", threshold=math.inf)),
    "heterogeneous": replace(PUBLISHED, gate=None),
    "default": ACE,
}
"""The published method's two branches, by a threshold that no layer exceeds and one that every layer does; and what
`merge_method: ace` does when told nothing."""
# The paper's.
_FLOW_TIME = 300.0
RELATIVE_RANK = 1e-5
"""Singular values below this share of the largest are rounding in differences of float32 weights."""


def ours(layer: Layer, branch: str) -> Merge:
    """`merge_by_covariance`, with the options of a name in `OPTIONS`."""

    def merge() -> Tensor:
        experts = [Expert(name=str(t), tensor=tensor) for t, tensor in enumerate(layer.experts)]
        return merge_by_covariance(StoredTaskVectors(layer.base, experts), OPTIONS[branch]).task_vector

    return merge


def literal(layer: Layer, branch: str, dtype: torch.dtype = torch.float32) -> Merge:
    """The published steps one after the other, in float32; in float64, what both are held against."""
    gate = OPTIONS[branch].gate
    options = AceOptions(epsilon=EPSILON, heterogeneity_threshold=gate.threshold if gate else 0.0)

    def merge() -> Tensor:
        with torch.device(layer.base.device):
            return ace(task_vectors(layer, dtype), options, dtype=dtype, relative_rank=RELATIVE_RANK)

    return merge


def peer(layer: Layer, name: str, steps: int = 300) -> Merge:
    """`tsv_m`, `iso_c`, `iso_cts` or `wudi_adam`, written plainly, in float32."""
    functions: dict[str, Callable[[list[Tensor]], Tensor]] = {
        "tsv_m": lambda D: tsv_m(D, dtype=torch.float32),
        "iso_c": lambda D: iso_c(D, dtype=torch.float32),
        "iso_cts": lambda D: iso_cts(D, dtype=torch.float32),
        "wudi_adam": lambda D: wudi_adam(D, steps=steps, dtype=torch.float32),
    }

    def merge() -> Tensor:
        with torch.device(layer.base.device):
            return functions[name](task_vectors(layer, torch.float32))

    return merge


def swudi(layer: Layer) -> Merge:
    """`merge_method: wudi` with `solver: flow`, our own: most of its time is an eigendecomposition in any program."""

    def merge() -> Tensor:
        experts = [Expert(name=str(t), tensor=tensor) for t, tensor in enumerate(layer.experts)]
        return flow_interference(StoredTaskVectors(layer.base, experts), time=_FLOW_TIME, start="sum")

    return merge


def floor(layer: Layer) -> Merge:
    """The products of the module's docstring."""
    D = task_vectors(layer, torch.float32)
    m, n = layer.base.shape
    system, numerator = layer.base.new_empty(n, n), layer.base.new_empty(m, n)
    smaller = layer.base.new_empty(m, m) if m < n else system

    def multiply() -> Tensor:
        for d in D:
            torch.mm(d.T, d, out=system)
            if m < n:
                torch.mm(d, d.T, out=smaller)
                torch.mm(smaller, d, out=numerator)
            else:
                torch.mm(d, system, out=numerator)
        return numerator

    return multiply


def task_vectors(layer: Layer, dtype: torch.dtype) -> list[Tensor]:
    base = layer.base.to(dtype)
    return [expert.to(dtype) - base for expert in layer.experts]


def errors(layer: Layer, branch: str) -> dict[str, float]:
    """Relative Frobenius error of ours and of the literal float32 steps against the literal float64 steps."""
    exact = literal(layer, branch, torch.float64)()
    norm = float(exact.norm())
    return {
        name: float((merge().double() - exact).norm()) / norm
        for name, merge in {"ours": ours(layer, branch), "literal": literal(layer, branch)}.items()
    }
