"""What the startup hook adds to a start of Python that never imports mergekit.

Run it with the Python of an environment where mergekit-ace is installed:

    python -m benchmarks.startup [STARTS]

Every start is a fresh interpreter without `site`, which times the hook's line by itself and then everything that `site`
does: the environment's other startup files and ours again, by then without effect. The two are a pair from the same
moment of a machine that may be busy.
"""

import statistics
import subprocess
import sys
import sysconfig
from pathlib import Path

STARTUP_FILE = Path(sysconfig.get_path("purelib"), "mergekit_ace_autoload.pth")

# `os` is imported before: `site` has it already when it reads startup files.
TIMED_START = """
import os, sys, time
sys.path[:] = {path!r}
began = time.perf_counter()
{line}
hook = time.perf_counter()
import site
site.main()
print(1000 * (hook - began), 1000 * (time.perf_counter() - hook))
"""


def timed_start() -> tuple[float, float]:
    """Milliseconds of the hook's line, and of the rest of `site`."""
    code = TIMED_START.format(path=sys.path, line=STARTUP_FILE.read_text())
    done = subprocess.run([sys.executable, "-S", "-c", code], check=True, capture_output=True, text=True)
    hook, rest = map(float, done.stdout.split())
    return hook, rest


def main(starts: int = 200) -> None:
    timed_start()  # the first reads cold files
    times = [timed_start() for _ in range(starts)]
    low, middle, high = statistics.quantiles([hook for hook, _ in times], n=4)
    ratio = statistics.median(hook / rest for hook, rest in times)
    print(f"the hook takes {middle:.2f} ms (median of {starts} starts; quartiles {low:.2f} to {high:.2f} ms),")
    print(f"{ratio:.2f} times what the rest of `site` takes")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
