"""Fine-tunes of the real encoder, shortened to a step, and the texts that they are trained on."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from benchmarks.suites import encoder
from benchmarks.suites.catalogue import SUITES
from benchmarks.suites.encoder import Encoder
from benchmarks.suites.form import build
from benchmarks.suites.recipe import Expert, Suite
from benchmarks.suites.sentences import CLASSES, TASKS, TEST_ROWS, rows

# the others read whole libraries, which takes a minute
QUICK = ("masked", "order", "category")


@pytest.mark.parametrize("task", QUICK)
def test_no_row_is_in_both_splits_and_every_class_is_in_each(task: str) -> None:
    train, test = rows(task, "train"), rows(task, "test")
    assert len(test) == TEST_ROWS
    assert not set(train) & set(test)
    for split in (train, test):
        assert {label for _, label in split} == set(range(CLASSES[task]))


def test_a_masked_keyword_is_not_in_its_line() -> None:
    assert all(text.count("[MASK]") == 1 for text, _ in rows("masked", "test"))


def test_the_catalogue_names_known_tasks() -> None:
    assert CLASSES.keys() == TASKS.keys()
    for suite in SUITES.values():
        if suite.kind == "encoder":
            assert set(suite.tasks) <= set(TASKS)


def test_encoders_train_store_their_head_and_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [("words in order", 0), ("order in words", 1), ("a third text", 0), ("third text a", 1)]
    monkeypatch.setattr(encoder, "rows", lambda task, split: texts)
    monkeypatch.setattr(encoder, "BATCH", 2)
    monkeypatch.setattr(encoder, "HEAD_STEPS", 1)
    adapter = Expert(task="arguments", steps=1, learning_rate=1e-3, lora_rank=2)
    suite = Suite(name="short", kind="encoder", experts=(Expert(task="order", steps=1, learning_rate=1e-3), adapter))
    build(Encoder(), suite, tmp_path)
    assert load_file(tmp_path / "heads" / "order.safetensors")["weight"].shape == (2, 384)
    base, full, low = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "order", "arguments"))
    assert all(name.startswith(("roberta.", "classifier.")) for name in base)
    changed = {name for name in base if not full[name].equal(base[name])}
    assert "roberta.encoder.layer.5.output.dense.weight" in changed
    adapted = {name for name in base if not low[name].equal(base[name])}
    assert adapted <= {name for name in base if name.startswith("roberta.encoder") and base[name].ndim == 2}
    assert Encoder().accuracies(["order"], tmp_path, tmp_path / "order")["order"] in (0, 0.25, 0.5, 0.75, 1)
