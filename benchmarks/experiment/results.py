"""Measured rows of one suite, kept as JSON so that an interrupted table resumes."""

import json
import platform
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("mergekit-ace", "mergekit", "torch", "transformers", "peft", "scikit-learn", "numpy")


@dataclass(kw_only=True)
class Row:
    """One setting's merge, scored."""

    label: str
    group: str
    method: str
    parameters: dict[str, float | str | bool]
    accuracies: dict[str, float]
    relative_mean: float
    standard_error: float | None
    seconds: float
    date: str


@dataclass(kw_only=True)
class Results:
    """All rows of one suite, and what they rest on."""

    suite: str
    experts: dict[str, float]
    base: dict[str, float]
    test_rows: dict[str, int] | None
    environment: dict[str, str] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    """The error of each setting that could not be merged."""

    def add(self, row: Row) -> None:
        self.rows = [kept for kept in self.rows if kept.label != row.label] + [row]
        self.failures.pop(row.label, None)

    def labels(self) -> set[str]:
        """Of all settings that were tried."""
        return {row.label for row in self.rows} | self.failures.keys()

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Results":
        content = json.loads(path.read_text(encoding="utf-8"))
        content["rows"] = [Row(**row) for row in content["rows"]]
        return cls(**content)


def environment() -> dict[str, str]:
    """Versions of what the numbers depend on; no name of the machine."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def today() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d")
