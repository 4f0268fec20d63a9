"""Run a command and measure what it costs: wall seconds and peak memory of that process alone."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

# Nothing is fetched while the demo runs.
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024
"""Unit of `ru_maxrss`."""
LINES_SHOWN = 15


class StepError(Exception):
    """A step of the demo failed; the message names the step, its log and the log's last lines."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a process cost: wall seconds, and its peak resident memory in bytes."""

    seconds: float
    peak_bytes: int


def run(step: str, command: list[str], *, folder: Path, log: Path) -> Cost:
    """Run `command` in `folder` with its output in `log`, and say what it cost.

    The caller should be a small process: Linux hands a parent's peak memory down to the child that it starts.

    Raises:
        StepError: if the command fails.
    """
    start = time.perf_counter()
    with open(log, "wb") as output:
        process = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT)
        # wait4 gives the usage of this child; getrusage(RUSAGE_CHILDREN) would give the largest of all so far.
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LINES_SHOWN:]
        shown = "\n".join(["", *tail]).replace("\n", "\n    ")
        raise StepError(f"{step} failed with exit code {process.returncode}; the end of {log}:{shown}")
    return Cost(seconds=time.perf_counter() - start, peak_bytes=usage.ru_maxrss * MAXRSS_BYTES)
