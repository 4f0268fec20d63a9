"""Times of contenders that take turns."""

import time
from collections.abc import Callable, Mapping

import torch

# A round that takes longer than this is not repeated for the sake of warm caches.
_SHORT_ROUND = 5.0


def race(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    patience: float,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every contender in each round, in the order A B A B.

    A first round that pays for cold pages and for what libraries set up is left out, unless it is a long one (on a GPU
    always). At least one round counts; no further one begins after `patience` seconds.

    Args:
        contenders: by name; the value is called with nothing.
        rounds: most that count.
        patience: seconds.
        device: synchronized before and after every call when it is `cuda`.
        clock: what the seconds are read from; `time.process_time` leaves out what other processes take.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    began = time.perf_counter()
    cold = True
    while True:
        times = {name: _timed(run, device, clock) for name, run in contenders.items()}
        if not cold or (sum(times.values()) > _SHORT_ROUND and device == "cpu"):
            for name, value in times.items():
                seconds[name].append(value)
        cold = False
        counted = len(next(iter(seconds.values())))
        if counted and (counted >= rounds or time.perf_counter() - began > patience):
            return seconds


def _timed(run: Callable[[], object], device: str, clock: Callable[[], float]) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    began = clock()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - began
