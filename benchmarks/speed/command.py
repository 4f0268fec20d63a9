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
_TREE_SAMPLING_SECONDS = 0.5


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
    """Run it to its end. Memory and seconds of CPU are those of all its processes, sampled where there are several.

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
        cpu_seconds=max(usage.ru_utime + usage.ru_stime, sum(sampler.cpu.values())),
        peak_rss=max(usage.ru_maxrss * unit, sampler.peak_proportional),
        peak_anonymous=sampler.peak_anonymous,
        peak_device=int(peak_file.read_text()),
    )


class _Sampler(threading.Thread):
    """Follows what the kernel keeps no maximum of: a process's anonymous memory, and its descendants.

    All stays 0 where there is no /proc.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid = pid
        self.finished = threading.Event()
        self.peak_anonymous = 0
        """Of all processes together."""
        self.peak_proportional = 0
        """Likewise, of files too, a page that several have mapped counted once; 0 for one process."""
        self.cpu: dict[int, float] = {}
        """Seconds of each process, as last seen."""

    def run(self) -> None:
        others: list[int] = []
        of_others, due = 0, 0.0
        while not self.finished.wait(_SAMPLING_SECONDS):
            try:
                if time.perf_counter() >= due:
                    due = time.perf_counter() + _TREE_SAMPLING_SECONDS
                    others = _descendants(self.pid)
                    of_others = sum(_kilobytes(pid, "status", "RssAnon:") for pid in others)
                    for pid in (self.pid, *others):
                        self.cpu[pid] = max(self.cpu.get(pid, 0.0), _cpu_seconds(pid))
                    if others:
                        both = sum(_kilobytes(pid, "smaps_rollup", "Pss:") for pid in (self.pid, *others))
                        self.peak_proportional = max(self.peak_proportional, 1024 * both)
                own = _kilobytes(self.pid, "status", "RssAnon:")
            except OSError:
                return
            self.peak_anonymous = max(self.peak_anonymous, 1024 * (own + of_others))


def _descendants(pid: int) -> list[int]:
    """Processes that it started, and those that they started, as far as their parents live."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and (fields := _stat(int(folder.name))):
            children.setdefault(int(fields[1]), []).append(int(folder.name))
    found, begun = [], [pid]
    while begun:
        begun = [child for parent in begun for child in children.get(parent, [])]
        found += begun
    return found


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat after the name; none of a process that has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return []


def _cpu_seconds(pid: int) -> float:
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def _kilobytes(pid: int, file: str, name: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text(encoding="utf-8").splitlines()
    except OSError:  # it has ended
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(name))


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
