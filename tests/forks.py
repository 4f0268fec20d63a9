"""Many short processes that need the same slow imports."""

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path

# Imports once, and then runs each snippet in a fork of its own. It runs no tensor operation itself: a fork of a process
# whose OpenMP threads have started may hang.
_SERVER = """
import json, os, sys, traceback
{imports}
for line in sys.stdin:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        status = 0
        try:
            exec(json.loads(line), {"__name__": "__main__"})
        except SystemExit as ending:
            status = ending.code or 0
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        os._exit(status)
    os.close(writer)
    with open(reader, errors="replace") as pipe:
        output = pipe.read()
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), output]), flush=True)
os._exit(0)
"""


class ForkServer:
    """A process that has imported what its snippets need, and forks to run each of them.

    Args:
        python: the interpreter.
        imports: the import statements.
        folder: where it runs.
        variables: its environment.
    """

    def __init__(self, python: Path | str, imports: str, folder: Path, variables: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [python, "-c", _SERVER.replace("{imports}", imports)],
            cwd=folder,
            env=dict(variables),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, snippet: str) -> tuple[int, str]:
        """Exit status (negative: the signal that ended it) and output of a snippet."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(snippet), file=self._process.stdin, flush=True)
        status, output = json.loads(self._process.stdout.readline())
        return status, output

    def __enter__(self) -> "ForkServer":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()
