"""What was measured, in which environment, and whether it reaches its targets; kept as JSON."""

import json
import math
import os
import platform
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import mergekit_ace
from benchmarks.experiment.results import environment, today

_SOFTWARE = ("python", "mergekit", "torch")


@dataclass(kw_only=True)
class Timing:
    """Contenders that took turns on one layer."""

    study: str
    model: str
    m: int
    n: int
    experts: int
    seconds: dict[str, list[float]]
    """Of each contender, one number a round."""
    errors: dict[str, float] = field(default_factory=dict)
    """Relative, against float64."""
    extrapolated: list[str] = field(default_factory=list)
    """Contenders whose time was computed from a part of their steps."""
    date: str = field(default_factory=today)

    @property
    def key(self) -> tuple[object, ...]:
        return self.study, self.m, self.n, self.experts

    def best(self, name: str) -> float:
        return min(self.seconds[name])

    def ratio(self, name: str, to: str) -> float:
        """Median over the rounds of `name`'s seconds divided by `to`'s."""
        return statistics.median(a / b for a, b in zip(self.seconds[name], self.seconds[to], strict=True))


@dataclass(kw_only=True)
class Memory:
    """Peak memory of one layer's merge beyond its inputs."""

    study: str
    model: str
    m: int
    n: int
    experts: int
    peak: int
    """Bytes."""
    bound: int
    """Bytes: what the docstring of the route taken promises for the solve."""
    date: str = field(default_factory=today)

    @property
    def key(self) -> tuple[object, ...]:
        return self.study, self.m, self.n, self.experts


@dataclass(kw_only=True)
class Run:
    """Whole runs of mergekit-yaml with one recipe, one number a round."""

    checkpoint: str
    layers: int
    recipe: str
    seconds: list[float]
    cpu_seconds: list[float]
    """Of all threads, those that spin while they wait included."""
    peak_rss: list[int]
    """Bytes: the kernel's maximum, mapped pages of the input files included."""
    peak_anonymous: list[int]
    """Bytes that are the process's own, sampled; pages of files can be dropped, these cannot."""
    peak_device: list[int]
    """Bytes on the accelerator; 0 on the CPU."""
    date: str = field(default_factory=today)

    @property
    def key(self) -> tuple[object, ...]:
        return self.checkpoint, self.layers, self.recipe

    def ratio(self, to: "Run") -> float:
        """Median over the rounds of the seconds divided by `to`'s."""
        return statistics.median(a / b for a, b in zip(self.seconds, to.seconds, strict=False))

    def cpu_ratio(self, to: "Run") -> float:
        """The same of CPU seconds."""
        return statistics.median(a / b for a, b in zip(self.cpu_seconds, to.cpu_seconds, strict=False))


@dataclass(kw_only=True)
class Record:
    """All rows of one benchmark on one kind of device."""

    environment: dict[str, str] = field(default_factory=dict)
    timings: list[Timing] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)

    def add(self, row: Timing | Memory | Run) -> None:
        """In the place of what was measured before for the same case."""
        if isinstance(row, Timing):
            self.timings = [*(kept for kept in self.timings if kept.key != row.key), row]
        elif isinstance(row, Memory):
            self.memory = [*(kept for kept in self.memory if kept.key != row.key), row]
        else:
            self.runs = [*(kept for kept in self.runs if kept.key != row.key), row]

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Record":
        """What `path` holds, or nothing measured yet."""
        if not path.is_file():
            return cls()
        content = json.loads(path.read_text(encoding="utf-8"))
        return cls(
            environment=content["environment"],
            timings=[Timing(**row) for row in content["timings"]],
            memory=[Memory(**row) for row in content["memory"]],
            runs=[Run(**row) for row in content["runs"]],
        )


@dataclass(frozen=True, kw_only=True)
class Target:
    """A number to reach."""

    what: str
    limit: float
    at_least: bool = False
    """Otherwise at most."""
    value: float | None
    """None where nothing was measured for it."""

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def geometric_mean(values: list[float]) -> float | None:
    """None of no values."""
    return math.exp(statistics.fmean(map(math.log, values))) if values else None


def machine(device: str) -> dict[str, str]:
    """What speed depends on; no name of the machine."""
    known = environment()
    found = {name: known[name] for name in _SOFTWARE} | {
        "mergekit-ace": mergekit_ace.__version__,
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "load average at the start": f"{os.getloadavg()[0]:.1f}",
        "date": today(),
    }
    if device == "cuda":
        found["device"] = torch.cuda.get_device_name()
    return found


def _processor() -> str:
    listed = Path("/proc/cpuinfo")
    if listed.is_file():
        for line in listed.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
