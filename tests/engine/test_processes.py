"""What a driver hands to worker processes, and when; the workers are scripts that follow a plan of their own."""

import sys
from pathlib import Path

import pytest

from mergekit_ace.engine.shards import Shard
from mergekit_ace.engine.workers import processes
from mergekit_ace.engine.workers.processes import Processes, WorkerError
from tests.engine.receipts import blank_receipt

SHARDS = [Shard(file=f"model-{number}", tensors=(), costs=(), reads=()) for number in range(1, 4)]

WORKER = """
import json, signal, sys
signal.alarm(60)  # a driver that waits for ever is an error
def receive():
    return json.loads(sys.stdin.readline() or sys.exit())
def answer(**content):
    print(json.dumps(content), flush=True)
def receipt(file):
    answer(receipt=dict(json.loads(TEMPLATE), file=file))
receive()
"""

FINISHES_BEHIND = """
before = None
for _ in range(3):
    file = receive()["shard"]
    if before:
        receipt(before)  # only when the next one is here
    answer(merged=file)
    before = file
receipt(before)
receive()
"""

ENDS_BETWEEN_TWO = """
receipt(receive()["shard"])
sys.exit(3)
"""


def team(script: str, monkeypatch: pytest.MonkeyPatch) -> Processes:
    made = blank_receipt("")
    text = f"TEMPLATE = {made.model_dump_json()!r}\n{WORKER}{script}"
    monkeypatch.setattr(processes, "_COMMAND", (sys.executable, "-c", text))
    return Processes(job=Path("job"), devices=[None], threads=1, on_tensor=lambda name, seconds: None)


def test_a_worker_gets_its_next_file_while_it_finishes_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    receipts = list(team(FINISHES_BEHIND, monkeypatch).make(SHARDS))
    assert [receipt.file for receipt in receipts] == [shard.file for shard in SHARDS]


def test_a_worker_that_ends_between_two_files_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    receipts = team(ENDS_BETWEEN_TWO, monkeypatch).make(SHARDS)
    assert next(receipts).file == "model-1"
    with pytest.raises(WorkerError, match=r"worker 1 \(process \d+\) ended with status 3\. --resume"):
        next(receipts)
