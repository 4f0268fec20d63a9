"""A sample of mutmut's mutants of this package: `python tests/mutations.py --sample 200 --seed 1`, see CONTRIBUTING.md.

mutmut makes the mutants. To try one it starts pytest anew, with up to two thousand names of tests; here the tests are
collected once, every mutant is a fork of that process, and its tests run until one fails: those that killed other
mutants of the function or file first, then the fastest. `mutmut show NAME` shows the change of a mutant.
"""

import argparse
import json
import math
import os
import random
import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

# The folder of this file, which Python puts first, holds tests of packaging under the name of the library; and the
# startup hook has imported the package from the checkout, not its mutated copy.
sys.path.remove(str(Path(__file__).resolve().parent))
for name in [name for name in sys.modules if name.partition(".")[0] == "mergekit_ace"]:
    del sys.modules[name]

import pytest  # noqa: E402
from mutmut.__main__ import collect_source_file_mutation_data, create_mutants  # noqa: E402
from mutmut.configuration import config  # noqa: E402
from mutmut.mutation.data import MutantLineSpans  # noqa: E402
from mutmut.mutation.trampoline import set_mutant_under_test  # noqa: E402
from mutmut.state import state  # noqa: E402
from mutmut.utils.file_utils import copy_also_copy_files, copy_src_dir, setup_source_paths  # noqa: E402
from mutmut.utils.format_utils import mangled_name_from_mutant_name  # noqa: E402

COPY = Path("mutants")
# Processor seconds beyond thrice those of all tests of the function, after which a mutant counts as killed: a loop
# without an end.
GRACE = 20


def file_of(mutant: str) -> str:
    """The module, dotted."""
    return mutant.rpartition(".")[0]


def sample(mutants: Sequence[str], size: int, seed: int) -> list[str]:
    """`size` of the mutants, spread evenly over the files, in an order that makes a sample of any beginning."""
    draw = random.Random(seed)
    by_file: dict[str, list[str]] = {}
    for mutant in mutants:
        by_file.setdefault(file_of(mutant), []).append(mutant)
    shuffled = [mutant for group in by_file.values() for mutant in draw.sample(group, len(group))]
    step = len(shuffled) / size
    start = draw.random() * step
    drawn = [shuffled[int(start + i * step)] for i in range(size)]
    draw.shuffle(drawn)
    return drawn


def changes_only_strict(mutant: str) -> bool:
    """Whether it changes `strict` of a `zip` alone, whose arguments are of one length: no test can tell."""
    spans = MutantLineSpans.load(Path(file_of(mutant).replace(".", "/") + ".py"))
    assert spans is not None
    own = mutant.rpartition(".")[2]
    function = own.rpartition("__mutmut_")[0]
    names = [own, f"{function}__mutmut_orig"]
    sources = zip(names, spans.read_function_sources(names), strict=True)
    one, other = (re.sub(r",\s*(strict=\w+)?(?=\))", "", source.replace(name, function)) for name, source in sources)
    return one == other


class Runs:
    """Takes the place of pytest's loop over the tests."""

    def __init__(self, every: Sequence[str], drawn: Sequence[str], asked: argparse.Namespace) -> None:
        self.every, self.drawn = every, drawn
        self.hopeless = {mutant for mutant in drawn if changes_only_strict(mutant)}
        self.verbose, self.seconds = asked.verbose, asked.seconds
        self.failed: str | None = None
        # pytest redirects the file of standard output.
        self.output = os.fdopen(os.dup(1), "w", buffering=1)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """The first failure decides."""
        if report.failed:
            self.failed = report.nodeid

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Find which functions each test calls, then try every mutant."""
        # Made here, so that all children share it.
        session.config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
        # Processes that tests start shall import the mutated copy too.
        os.environ["PYTHONPATH"] = os.getcwd()
        # In another order than usual: the tests of a mutant run in an order of their own, which must not fail them.
        random.Random(0).shuffle(session.items)
        calls = self._in_fork(lambda: list(self._calls(session.items)), "stats")
        assert calls, "the tests fail without a mutant"
        tests_of: dict[str, list[int]] = {}
        for place, (_, functions) in enumerate(calls):
            for function in functions:
                tests_of.setdefault(function, []).append(place)
        for function in sorted({mangled_name_from_mutant_name(mutant) for mutant in self.every} - tests_of.keys()):
            self.output.write(f"no test calls {function}\n")
        kills: Counter[tuple[str, int]] = Counter()
        outcomes: Counter[str] = Counter()
        for mutant in self.drawn:
            function = mangled_name_from_mutant_name(mutant)
            tests = tests_of.get(function, [])
            tests.sort(key=lambda i, of=function: (-kills[of, i], -kills[file_of(of), i], calls[i][0]))  # type: ignore[misc]
            started = time.monotonic()
            # The place of the test that failed; -1: none did; None: the fork ended before.
            killer: int | None = -1
            if mutant not in self.hopeless:
                most = int(3 * sum(calls[i][0] for i in tests)) + GRACE
                killer = self._in_fork(partial(self._first_failure, session.items, tests), mutant, most)
            outcome = (
                "no tests" if not tests else "timeout" if killer is None else "survived" if killer < 0 else "killed"
            )
            outcomes[outcome] += 1
            if killer is not None and killer >= 0:
                kills[function, killer] += 1
                kills[file_of(function), killer] += 1
            if self.verbose or outcome != "killed":
                by = (
                    session.items[killer].nodeid
                    if outcome == "killed" and killer is not None
                    else f"{len(tests)} tests"
                )
                self.output.write(f"{outcome:9} {mutant} {by} {time.monotonic() - started:.1f} s\n")
        self.output.write(f"{dict(outcomes)}\n")
        return True

    def _calls(self, items: Sequence[pytest.Item]) -> Iterator[tuple[float, list[str]]]:
        """Processor seconds and functions of each test."""
        for item, following in zip(items, [*items[1:], None], strict=True):
            state()._stats.clear()
            started = time.process_time()
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            assert self.failed is None, self.failed
            yield time.process_time() - started, sorted(state()._stats)

    def _first_failure(self, items: Sequence[pytest.Item], tests: Sequence[int]) -> int:
        until = time.process_time() + self.seconds
        for place, following in zip(tests, [*tests[1:], None], strict=True):
            after = None if following is None else items[following]
            items[place].config.hook.pytest_runtest_protocol(item=items[place], nextitem=after)
            if self.failed is not None:
                return place
            if time.process_time() > until:
                break
        return -1

    def _in_fork(self, work: Callable[[], Any], mutant: str, most: int | None = None) -> Any:
        """What `work` returns, made in a fork where `mutant` is active; None where the fork ended before."""
        answer, question = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(answer)
            # What pytest writes of the tests of a mutant is of no use.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            if mutant != "stats":
                for standard in (1, 2):
                    os.dup2(nowhere, standard)
            if most is not None:
                resource.setrlimit(resource.RLIMIT_CPU, (most + int(time.process_time()),) * 2)
            set_mutant_under_test(mutant)
            with os.fdopen(question, "w") as out:
                try:
                    json.dump(work(), out)
                except BaseException as error:
                    self.output.write(f"{mutant}: {error!r}\n")
            os._exit(0)
        os.close(question)
        with os.fdopen(answer) as lines:
            text = lines.read()
        os.waitpid(child, 0)
        return json.loads(text) if text else None


def main() -> None:
    """Make the mutants, draw some, try them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, help="how many, spread over the files; all of them if left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=math.inf, help="of tests a mutant; others count as survived")
    parser.add_argument("--verbose", action="store_true", help="a line for each killed mutant too")
    parser.add_argument("names", nargs="*", help="of mutants, or patterns of them, in place of all")
    asked = parser.parse_args()
    os.environ["MUTANT_UNDER_TEST"] = "mutant_generation"
    COPY.mkdir(exist_ok=True)
    copy_src_dir()
    copy_also_copy_files()
    setup_source_paths()
    create_mutants(1)
    every = sorted(name for _, name, _ in collect_source_file_mutation_data(mutant_names=asked.names)[0])
    drawn = sample(every, min(asked.sample, len(every)), asked.seed) if asked.sample else every
    runs = Runs(every, drawn, asked)
    print(f"{len(drawn)} of {len(every)} mutants")
    set_mutant_under_test("")
    os.chdir(COPY)
    selected = config().pytest_add_cli_args_test_selection
    sys.exit(pytest.main(["--rootdir=.", "-q", "-p", "no:cacheprovider", *selected], plugins=[runs]))


if __name__ == "__main__":
    main()
