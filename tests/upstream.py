"""mergekit's own tests, unmodified, with this plugin and without it: `python -m tests.upstream FOLDER`.

FOLDER is mergekit's unpacked source distribution or a checkout of the installed version. Of it only the tests are
used; what they test is the installed mergekit. A test may fail (many ask a hub for a model), but then it fails without
the plugin too: any other outcome than without it is an error, and so is a run in which nothing passed.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

SWITCH = "MERGEKIT_ACE_AUTOLOAD"
METHODS = "from mergekit.merge_methods import registered_methods; print(*(m.spec.name for m in registered_methods()))"

Outcomes = dict[str, str]


def main(source: Path) -> int:
    """Run them twice and compare; the exit status."""
    with_plugin, without = ({**os.environ, SWITCH: value} for value in "10")
    added = methods(with_plugin) - methods(without)
    if "ace" not in added:
        print(f"the plugin must add its methods to mergekit's; got {sorted(added)}. Is mergekit-ace installed?")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        # Alone, so that no `mergekit` lies beside them and is imported in place of the installed one.
        for part in ("tests", "pyproject.toml"):
            copy = shutil.copytree if (source / part).is_dir() else shutil.copy
            copy(source / part, Path(folder, part))
        Path(folder, "tests", "__init__.py").touch()  # or an editable install's tests would be `tests`, ours
        expected, got = run(Path(folder), without), run(Path(folder), with_plugin)
    return compare(expected, got)


def methods(environment: dict[str, str]) -> set[str]:
    """The names of the merge methods that mergekit knows."""
    command = [sys.executable, "-c", METHODS]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return set(done.stdout.split())


def run(folder: Path, environment: dict[str, str]) -> Outcomes:
    """Each test's outcome; a file that cannot be imported counts as one test."""
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "--quiet", "--tb=no", "--continue-on-collection-errors"]
    print(f"{SWITCH}={environment[SWITCH]}", flush=True)
    subprocess.run([*command, f"--junitxml={report}", "tests"], cwd=folder, env=environment, check=False)
    cases = ElementTree.parse(report).iter("testcase")
    return {".".join(filter(None, (case.get("classname"), case.get("name")))): outcome(case) for case in cases}


def outcome(case: ElementTree.Element) -> str:
    return next((part.tag for part in case if part.tag in ("failure", "error", "skipped")), "passed")


def compare(expected: Outcomes, got: Outcomes) -> int:
    """Print what both runs have in common and where they differ; the exit status."""
    common = dict(expected.items() & got.items())
    counts = Counter(common.values())
    print("The same with the plugin and without it:", ", ".join(f"{counts[ending]} {ending}" for ending in counts))
    for test in sorted(test for test, ending in common.items() if ending in ("failure", "error")):
        print(f"  {common[test]} {test}")

    # Tests that go through every method known: not there without the plugin, they must pass with it.
    more = {test for test in got.keys() - expected.keys() if got[test] == "passed"}
    print(f"With the plugin alone: {len(more)} passed")

    differences = sorted((expected.keys() | got.keys()) - common.keys() - more)
    for test in differences:
        print(f"DIFFERENT: {test}: {expected.get(test)} without the plugin, {got.get(test)} with it")
    return int(bool(differences) or not counts["passed"])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
