"""What a merge will take on this machine: an estimate from shapes and a moment's measurement."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from mergekit.common import dtype_from_name
from rich.filesize import decimal

from mergekit_ace.checkpoints.headers import TensorHeader
from mergekit_ace.checks.devices import missing_device
from mergekit_ace.checks.memory import available_memory
from mergekit_ace.methods.layerwise import LayerwiseMethod
from mergekit_ace.recipe.arithmetic import Arithmetic
from mergekit_ace.recipe.findings import Finding
from mergekit_ace.recipe.plan import Plan
from mergekit_ace.recipe.tensor_cost import PYTHON, TensorCost, tensor_cost

# Sizes of the matrices that are multiplied and decomposed to measure the machine: the first that takes long enough for
# the start of the work not to count, some 10 us of a product and ms of a decomposition on an accelerator.
_PROBES = (512, 1024, 2048, 4096, 8192)
_LONG_ENOUGH = 0.02


@dataclass(frozen=True, kw_only=True)
class Cost:
    """All in bytes and seconds."""

    read: int
    written: int
    memory: int
    """Peak of the process on the CPU: inputs and workspace of the largest tensor, the shard being written, Python."""
    workspace: int
    """Peak of one tensor, inputs included: what a device needs with `--cuda`."""
    seconds: float | None
    """Of the arithmetic, reading and writing left out; None for a method that is not ours, or another machine's."""
    available: int | None
    """Memory that programs can get on this machine; None where it is not known."""
    device: int | None
    """Free memory of the chosen accelerator; None on the CPU."""


def estimate(plan: Plan) -> Cost:
    """Estimate from the headers, and from the speed of products and decompositions on the chosen device."""
    costs = list(_costs(plan))
    arithmetic = sum((cost.arithmetic for cost in costs), start=Arithmetic())
    written = sum(cost.written for cost in costs)
    workspace = max((cost.inputs + cost.workspace for cost in costs), default=0)
    seconds = None
    if isinstance(plan.method, LayerwiseMethod) and missing_device(plan.options) is None:
        speed = _speed(plan.device)
        seconds = (
            arithmetic.single * speed.single + arithmetic.double * speed.double + arithmetic.cubes * speed.decomposition
        )
    shard = min(written, plan.options.out_shard_size)  # bytes; mergekit's help calls it a number of parameters
    return Cost(
        read=sum(cost.read for cost in costs),
        written=written,
        memory=workspace + shard + PYTHON,
        workspace=workspace,
        seconds=seconds,
        available=available_memory(),
        device=_free_on(plan.device),
    )


def _costs(plan: Plan) -> Iterator[TensorCost]:
    """Of every tensor that is in a checkpoint: the output's shape is taken for the first model's."""
    dtype, out = dtype_from_name(plan.recipe.config.dtype), dtype_from_name(plan.recipe.config.out_dtype)
    for tensor in plan.tensors:
        models = [model for model in (tensor.base, *tensor.experts) if model is not None and tensor.reads(model)]
        header = next((header for model in models if (header := tensor.header(model)) is not None), None)
        if header is not None:
            yield tensor_cost(plan, tensor, TensorHeader(shape=header.shape, dtype=out or dtype or header.dtype))


def check_cost(cost: Cost) -> Iterator[Finding]:
    """A merge that does not fit."""
    if cost.available is not None and cost.memory > cost.available:
        yield Finding(
            level="warning",
            what=f"the merge needs about {decimal(cost.memory)} of memory; {decimal(cost.available)} are available",
            remedy="Lower --out-shard-size: mergekit holds a whole shard before it writes it.",
        )
    if cost.device is not None and cost.workspace > cost.device:
        yield Finding(
            level="warning",
            what=f"the largest tensor needs about {decimal(cost.workspace)} of device memory; "
            f"{decimal(cost.device)} are free",
            remedy="Run it without --cuda, or free the device.",
        )


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds of a multiply-add in float32 and float64, and of a float64 eigendecomposition over its size cubed."""

    single: float
    double: float
    decomposition: float


@lru_cache(maxsize=8)
def _speed(device: torch.device) -> Speed:
    return Speed(
        single=per_cube(lambda size: _product_seconds(size, device, torch.float32)),
        double=per_cube(lambda size: _product_seconds(size, device, torch.float64)),
        decomposition=per_cube(lambda size: _decomposition_seconds(size, device)),
    )


def per_cube(seconds: Callable[[int], float]) -> float:
    """Seconds over the size cubed, of the first size that takes long enough to be measured."""
    measured = 0.0
    for size in _PROBES:
        measured = seconds(size) / size**3
        if measured * size**3 >= _LONG_ENOUGH:
            break
    return measured


def _product_seconds(size: int, device: torch.device, dtype: torch.dtype) -> float:
    matrix = _matrix(size, device).to(dtype)
    return _seconds(lambda: matrix @ matrix)


def _decomposition_seconds(size: int, device: torch.device) -> float:
    matrix = _matrix(size, device).double()
    symmetric = matrix + matrix.mT
    return _seconds(lambda: torch.linalg.eigh(symmetric))


def _matrix(size: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator(device="cpu").manual_seed(0)
    return torch.randn(size, size, generator=generator, device="cpu").to(device)


def _seconds(work: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(3):  # the first warms up; the fastest has met the least of other programs
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def _free_on(device: torch.device) -> int | None:
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return int(torch.cuda.mem_get_info(device)[0])
