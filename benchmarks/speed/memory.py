"""Peak memory of one layer's merge beyond its inputs, each in a process of its own.

python -m benchmarks.speed.memory SHAPE EXPERTS BRANCH DEVICE    prints bytes and seconds

On Linux the kernel's own maximum of the resident set, reset after the inputs are made. The allocator is told to return
every large block at once, so that blocks freed before cannot serve the merge unseen.
"""

import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.speed.contenders import ours
from benchmarks.speed.layers import Shape, fine_tuned, parse_shape
from mergekit_ace.matrix.workload import working_numbers

PROJECT = Path(__file__).resolve().parents[2]
_RESET = Path("/proc/self/clear_refs")
_WARM_UP = Shape(model="warm-up", m=64, n=48)


def measurable(device: str) -> bool:
    """Whether this system lets a process reset and read its peak."""
    return device == "cuda" or _RESET.exists()


def peak_and_seconds(shape: Shape, experts: int, branch: str, device: str) -> tuple[int, float]:
    """Bytes, and seconds of the one merge, measured in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.speed.memory", shape.name, str(experts), branch, device]
    settings = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 17)}
    done = subprocess.run(command, cwd=PROJECT, env=settings, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[2:])} failed:\n{done.stderr[-2000:]}")
    peak, seconds = done.stdout.split()
    return int(peak), float(seconds)


def documented_bound(shape: Shape, experts: int) -> int:
    """Bytes that a merge of full fine-tunes allows itself (`layer.workload`)."""
    return torch.float32.itemsize * working_numbers(shape.m, shape.n, experts)


def _peak_and_seconds(shape: Shape, experts: int, branch: str, device: str) -> tuple[int, float]:
    ours(fine_tuned(_WARM_UP, experts, device), branch)()
    merge = ours(fine_tuned(shape, experts, device), branch)
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds = _seconds(merge, device)
        return torch.cuda.max_memory_allocated() - before, seconds
    _RESET.write_text("5")
    before = _resident("VmRSS")
    seconds = _seconds(merge, device)
    return _resident("VmHWM") - before, seconds


def _seconds(merge: Callable[[], object], device: str) -> float:
    began = time.perf_counter()
    merge()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _resident(field: str) -> int:
    """A size in bytes from the kernel's account of this process."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status must have a line {field}; got none")


if __name__ == "__main__":
    print(*_peak_and_seconds(parse_shape(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]))
