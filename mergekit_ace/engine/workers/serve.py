"""A worker process: reads names of shards from its standard input, answers on its standard output, a JSON a line.

    -> {"job": FILE, "device": "cuda:1" or null, "threads": 2}
    -> {"shard": "model-00007-of-00031.safetensors"}     as often as there is one
    <- {"tensor": NAME, "seconds": 0.5}                  as they are made
    <- {"merged": "model-00007-of-00031.safetensors"}    the next one can be begun while this one is finished
    <- {"receipt": {...}} or {"error": "..."}            one for each shard

It ends with its input: when the driver ends, whatever this process is doing.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from mergekit_ace.engine.unfinished import Unfinished

_ANSWERING = threading.Lock()


def main() -> None:
    """Serve until the input ends."""
    # Libraries print; the protocol's channel is kept from them.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lines: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_read, args=(lines,), daemon=True).start()
    start = lines.get()
    try:
        _serve(start, lines, answers)
    except Exception as error:
        from mergekit_ace.recipe.failures import message_of

        _answer(answers, error=message_of(error))


def _serve(start: dict[str, Any], lines: queue.Queue[dict[str, Any]], answers: TextIO) -> None:
    import logging
    from pathlib import Path

    import torch

    from mergekit_ace.engine.job import Job, opened

    torch.set_num_threads(start["threads"])
    job = Job.model_validate_json(Path(start["job"]).read_text(encoding="utf-8"))
    # Warnings go into the receipts: the driver shows each once.
    logging.getLogger().addHandler(logging.NullHandler())
    shards = {shard.file: shard for shard in job.plan.shards}

    def note(name: str, seconds: float) -> None:
        _answer(answers, tensor=name, seconds=round(seconds, 4))

    with opened(job, start["device"], note) as maker:
        while True:
            unfinished = maker.make(shards[(file := lines.get()["shard"])])
            unfinished.when_finished(lambda finished: _report(answers, finished))
            _answer(answers, merged=file)


def _report(answers: TextIO, finished: Unfinished) -> None:
    try:
        _answer(answers, receipt=finished.receipt().model_dump(mode="json"))
    except Exception as error:
        from mergekit_ace.recipe.failures import message_of

        _answer(answers, error=message_of(error))


def _answer(answers: TextIO, **content: object) -> None:
    with _ANSWERING:
        answers.write(json.dumps(content) + "\n")
        answers.flush()


def _read(lines: queue.Queue[dict[str, Any]]) -> None:
    for line in sys.stdin:
        lines.put(json.loads(line))
    os._exit(0)


if __name__ == "__main__":
    main()
