"""Several processes on this machine: one a GPU, or several that share the cores of the CPU."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit_ace.engine.receipt import Receipt
from mergekit_ace.engine.shards import Shard

_COMMAND = (sys.executable, "-m", "mergekit_ace.engine.workers.serve")
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_PATIENCE_SECONDS = 10


class WorkerError(RuntimeError):
    """A shard could not be made by a worker in another process."""


@dataclass
class _Worker:
    number: int
    process: subprocess.Popen[str]
    files: list[str] = field(default_factory=list)
    """Those that it has not sent the receipt of: the last one is being merged, one before it finished."""

    def send(self, **content: object) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its death is reported by the thread that reads from it
            self.process.stdin.write(json.dumps(content) + "\n")
            self.process.stdin.flush()


@dataclass
class Processes:
    """Hands shards to worker processes as they become free.

    Args:
        job: the file of a `Job`.
        devices: one a process; None for the device of the job's options.
        threads: of each process.
        on_tensor: told of every tensor that any of them merges.
    """

    job: Path
    devices: Sequence[str | None]
    threads: int
    on_tensor: Callable[[str, float], None]
    elsewhere: bool = True
    _answers: queue.Queue[tuple[_Worker, dict[str, Any] | None]] = field(default_factory=queue.Queue)

    @property
    def description(self) -> str:
        """As `Workers.description`."""
        devices = [device for device in self.devices if device is not None]
        where = f" on {', '.join(devices)}" if devices else f" of {self.threads} threads each"
        return f"{len(self.devices)} processes{where}"

    def make(self, shards: Sequence[Shard]) -> Generator[Receipt, None, None]:
        """As `Workers.make`.

        Raises:
            WorkerError: naming the shard, and what stopped it.
        """
        waiting = list(shards)
        workers: list[_Worker] = []
        try:
            for number, device in list(enumerate(self.devices))[: len(shards)]:
                workers.append(self._start(number, device))
                self._next(workers[-1], waiting)
            for _ in shards:
                yield self._finished(waiting)
        finally:
            for worker in workers:
                _stop(worker.process)

    def _start(self, number: int, device: str | None) -> _Worker:
        environment = {**os.environ, **dict.fromkeys(_THREAD_VARIABLES, str(self.threads))}
        process = subprocess.Popen(
            _COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
            encoding="utf-8",
            # Ctrl-C reaches the driver alone, which stops its workers.
            start_new_session=True,
        )
        worker = _Worker(number, process)
        threading.Thread(target=self._listen, args=(worker,), daemon=True).start()
        worker.send(job=str(self.job), device=device, threads=self.threads)
        return worker

    def _next(self, worker: _Worker, waiting: list[Shard]) -> None:
        if waiting:
            worker.files.append(waiting.pop(0).file)
            worker.send(shard=worker.files[-1])

    def _finished(self, waiting: list[Shard]) -> Receipt:
        """The next receipt; gives workers the shards that wait until there is one."""
        while True:
            worker, answer = self._answers.get()
            if answer is None:
                if worker.files or waiting:
                    raise WorkerError(_epitaph(worker))
            elif "tensor" in answer:
                self.on_tensor(answer["tensor"], answer["seconds"])
            elif "merged" in answer:
                self._next(worker, waiting)
            elif "error" in answer:
                raise WorkerError(str(answer["error"]))
            else:
                receipt = Receipt.model_validate(answer["receipt"])
                worker.files.remove(receipt.file)
                return receipt

    def _listen(self, worker: _Worker) -> None:
        assert worker.process.stdout is not None
        with worker.process.stdout as answers:
            for line in answers:
                self._answers.put((worker, json.loads(line)))
        self._answers.put((worker, None))


def _epitaph(worker: _Worker) -> str:
    status = worker.process.wait()
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    what = f" while it made {worker.files[-1]}" if worker.files else ""
    message = f"worker {worker.number + 1} (process {worker.process.pid}) {how}{what}"
    if status == -signal.SIGKILL:
        message += ". The machine may be out of memory: take fewer --workers"
    return f"{message}. --resume goes on with the finished shards"


def _stop(process: subprocess.Popen[str]) -> None:
    """End a worker by closing its input, or by force where it does not listen."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(_PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
