"""The four tasks: their labels, their test sets and their classifier heads, all stored beside this file."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
HEADS = FOLDER / "tasks" / "heads.safetensors"
MAX_TOKENS = 40
"""Texts are cut to this length, as they were when the experts were trained."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One classification task; its labels are a slice of the model's joint label list."""

    name: str
    labels: tuple[str, ...]
    offset: int
    """Index of the first of `labels` among the labels of all tasks."""

    @property
    def label_slice(self) -> slice:
        """Where the logits of this task lie among the logits of all tasks."""
        return slice(self.offset, self.offset + len(self.labels))

    @property
    def adapter(self) -> Path:
        """Folder of the LoRA adapter that is the expert on this task."""
        return FOLDER / "adapters" / self.name

    def test_set(self, limit: int | None = None) -> tuple[list[str], list[int]]:
        """Texts of the test set and the index of each one's label in `labels`; the first `limit` of them if given."""
        with open(FOLDER / "tasks" / f"{self.name}.jsonl", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file][:limit]
        return [row["text"] for row in rows], [self.labels.index(row["label"]) for row in rows]


def _load() -> Iterator[Task]:
    offset = 0
    for name, labels in json.loads((FOLDER / "tasks" / "labels.json").read_text(encoding="utf-8")).items():
        yield Task(name=name, labels=tuple(labels), offset=offset)
        offset += len(labels)


TASKS = tuple(_load())
