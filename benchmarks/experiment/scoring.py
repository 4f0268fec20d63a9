"""A suite of experts on disk, and the program that scores models on it; benchmarks/README.md lays down the form."""

import ast
import json
import math
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from benchmarks.suites.catalogue import SUITES
from benchmarks.suites.recipe import KINDS_THAT_GENERATE, KINDS_WITH_ANSWERS, KINDS_WITH_PROMPTS

MODEL_LINE = re.compile(r"^(?P<folder>.+): relative mean (?P<mean>-?[\d.]+|nan) (?P<accuracies>\{.*\})$")
COMMANDS = ("mergekit-yaml", "mergekit-pytorch")
PROJECT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class BuiltSuite:
    """Experts in a folder, and the program (of our catalogue, or a `suite.py`) that built them and scores models."""

    name: str
    program: tuple[str, ...]
    root: Path

    @classmethod
    def found(cls, text: str, builds: Path) -> "BuiltSuite":
        """From a name of our catalogue, or a folder that holds a `suite.py`; checkpoints lie under `builds/<name>`.

        Raises:
            ValueError: neither.
        """
        if text in SUITES:
            return cls(text, (sys.executable, "-m", "benchmarks.suites", text), builds / text)
        script = Path(text).resolve() / "suite.py"
        if not script.is_file():
            names = ", ".join(SUITES)
            raise ValueError(f"a suite must be a folder with a suite.py, or one of {names}; got {text!r}")
        return cls(script.parent.name, (sys.executable, str(script)), builds / script.parent.name)

    def ensure_built(self) -> None:
        """Build once; a folder whose building broke off has no `base` under this name."""
        if self.root.is_dir():
            return
        partial = self.root.with_name(self.root.name + ".partial")
        self.run("build", str(partial))
        partial.rename(self.root)

    @cached_property
    def facts(self) -> dict[str, object]:
        """The optional `suite.json`."""
        path = self.root / "suite.json"
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}

    @property
    def tasks(self) -> list[str]:
        listed = self.facts.get("tasks")
        if isinstance(listed, list):
            return [str(task) for task in listed]
        return sorted(path.parent.name for path in self.root.glob("*/config.json") if path.parent.name != "base")

    @property
    def command(self) -> str:
        """The mergekit command that can plan these checkpoints."""
        return str(self.facts.get("command", COMMANDS[0]))

    @property
    def test_rows(self) -> dict[str, int] | None:
        """Test rows of each task: as stated by the suite, else the lines of `tasks/<task>.jsonl` beside its program."""
        stated = self.facts.get("test_rows")
        if isinstance(stated, dict):
            return {str(task): int(rows) for task, rows in stated.items()}
        files = {task: Path(self.program[-1]).parent / "tasks" / f"{task}.jsonl" for task in self.tasks}
        if all(path.is_file() for path in files.values()):
            return {task: len(path.read_text(encoding="utf-8").splitlines()) for task, path in files.items()}
        return None

    @property
    def has_prompts(self) -> bool:
        """Whether its program writes prompts of each task."""
        return self._is("prompts", KINDS_WITH_PROMPTS)

    @property
    def has_answers(self) -> bool:
        """Whether these prompts have answers."""
        return self._is("answers", KINDS_WITH_ANSWERS)

    @property
    def generates(self) -> bool:
        """Whether its experts generate text."""
        return self._is("generates", KINDS_THAT_GENERATE)

    def _is(self, fact: str, kinds: tuple[str, ...]) -> bool:
        if self.name in SUITES:
            return SUITES[self.name].kind in kinds
        return bool(self.facts.get(fact, False))

    def write_prompts(self, folder: Path, count: int) -> dict[str, Path]:
        """So many training prompts of each task, and a tokenizer into the base's folder."""
        self.run("prompts", str(self.root), str(folder), str(count))
        return {task: folder / f"{task}.jsonl" for task in self.tasks}

    def score(self, folders: list[Path]) -> tuple[dict[str, float], dict[Path, dict[str, float]]]:
        """Accuracies in [0, 1] of the experts on their own tasks, and of every folder's model on all tasks."""
        return parsed(self.run("score", str(self.root), *map(str, folders)))

    def run(self, *arguments: str) -> str:
        done = subprocess.run([*self.program, *arguments], cwd=PROJECT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"suite {self.name} failed to {arguments[0]}:\n{done.stderr[-2000:]}")
        return done.stdout


def parsed(printed: str) -> tuple[dict[str, float], dict[Path, dict[str, float]]]:
    """What `score` printed.

    Raises:
        ValueError: the experts' line is missing.
    """
    experts: dict[str, float] | None = None
    models = {}
    for line in printed.splitlines():
        if line.startswith("experts {"):
            experts = ast.literal_eval(line.removeprefix("experts "))
        elif match := MODEL_LINE.match(line):
            models[Path(match["folder"])] = ast.literal_eval(match["accuracies"])
    if experts is None:
        raise ValueError(f"a suite's score must print a line 'experts {{...}}'; got {printed[:200]!r}")
    return experts, models


def relative_mean(accuracies: dict[str, float], experts: dict[str, float]) -> float:
    """Mean accuracy relative to the experts, in percent."""
    return 100 * sum(accuracies[task] / experts[task] for task in experts) / len(experts)


def standard_error(accuracies: dict[str, float], experts: dict[str, float], rows: dict[str, int]) -> float:
    """Standard error of `relative_mean` from the binomial variance of each accuracy, the experts' taken as given.

    Models are scored on the same rows, so the difference of two is less noisy than this.
    """
    # A share of a loss is negative where a merge is worse than the base.
    variance = sum(abs(accuracies[t] * (1 - accuracies[t])) / rows[t] / experts[t] ** 2 for t in experts)
    return 100 * math.sqrt(variance) / len(experts)
