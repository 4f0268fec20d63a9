"""`mergekit-yaml` or `mergekit-ace merge` in a process of its own, with what it used.

python -m benchmarks.speed.command COMMAND PEAK RECIPE OUT [OPTION]...

The click entry point of the installed command, with this project's methods registered; at the end the peak memory on
the accelerator is written to the file PEAK, 0 where there is none.
"""

import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

PROJECT = Path(__file__).resolve().parents[2]
_SAMPLING_SECONDS = 0.02


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Of one run, start of Python and imports included."""

    seconds: float
    cpu_seconds: float
    peak_rss: int
    peak_anonymous: int
    peak_device: int


Command = Literal["mergekit-yaml", "mergekit-ace"]


def run_merge(command_name: Command, recipe: Path, out: Path, *options: str) -> Usage:
    """Run it to its end. Of several processes the memory is that of the first, the seconds of CPU are of all.

    Raises:
        RuntimeError: it failed; with the end of what it printed.
    """
    peak_file, log = out.with_name(out.name + ".peak"), out.with_name(out.name + ".log")
    arguments = [command_name, str(peak_file), str(recipe), str(out), *options]
    command = [sys.executable, "-m", "benchmarks.speed.command", *arguments]
    with log.open("wb") as printed:
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=PROJECT, stdout=printed, stderr=subprocess.STDOUT)
        sampler = _Sampler(process.pid)
        sampler.start()
        # not `wait`: the kernel tells this child's own peak only to who waits for it in this way
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    sampler.finished.set()
    sampler.join()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command[4:])} failed:\n{log.read_text(errors='replace')[-3000:]}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Usage(
        seconds=seconds,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_rss=usage.ru_maxrss * unit,
        peak_anonymous=sampler.peak,
        peak_device=int(peak_file.read_text()),
    )


class _Sampler(threading.Thread):
    """Follows a process's anonymous memory, which the kernel keeps no maximum of; stays 0 where there is no /proc."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.status = Path(f"/proc/{pid}/status")
        self.finished = threading.Event()
        self.peak = 0

    def run(self) -> None:
        while not self.finished.wait(_SAMPLING_SECONDS):
            try:
                lines = self.status.read_text(encoding="utf-8").splitlines()
            except OSError:
                return
            sizes = [1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")]
            self.peak = max(self.peak, *sizes) if sizes else self.peak


def _run(command: str, peak_file: Path, arguments: list[str]) -> None:
    import torch
    from mergekit.scripts import run_yaml

    import mergekit_ace
    from mergekit_ace.cli import main

    mergekit_ace.register()
    if command == "mergekit-ace":
        main.main(args=["merge", *arguments], prog_name=command, standalone_mode=False)
    else:
        run_yaml.main.main(args=arguments, prog_name=command, standalone_mode=False)
    peak_file.write_text(str(torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0))


if __name__ == "__main__":
    _run(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
