"""What runs on a node of a Ray cluster: looks for the shared storage, then makes shards."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path
from typing import Any

from mergekit_ace.checkpoints.fingerprint import fingerprint
from mergekit_ace.engine.job import Job, opened
from mergekit_ace.engine.memory import free_memory
from mergekit_ace.engine.shards import Shard


class Actor:
    """Makes shards in a process of its own on any node; the class of the Ray actors."""

    def __init__(self) -> None:
        self._maker: Any = None
        self._shards: dict[str, Shard] = {}
        self._open = contextlib.ExitStack()
        self._unfinished: Any = None
        self._nonce = ""
        self._nonce_file = Path()

    def prepare(self, job_text: str, nonce_file: str, nonce: str, threads: int, neighbours: int) -> None:
        """Look for the shared storage and plan the merge.

        Args:
            job_text: the `Job`, whose memory is that of all actors of a node.
            nonce_file: what the driver has written beside the output.
            nonce: what is in it.
            threads: of this actor.
            neighbours: how many actors a node may have, this one included.

        Raises:
            RuntimeError: naming this node, if it does not see the output or an input.
        """
        import torch

        torch.set_num_threads(threads)
        job = Job.model_validate_json(job_text)
        self._nonce, self._nonce_file = nonce, Path(nonce_file)
        require_shared(job, self._nonce_file, nonce)
        memory = free_memory() if job.memory is None else job.memory
        job = job.model_copy(update={"memory": None if memory is None else memory // neighbours})
        self._maker = self._open.enter_context(opened(job, None, lambda name, seconds: None))
        self._shards = {shard.file: shard for shard in job.plan.shards}

    def make(self, file: str) -> list[str]:
        """Merge a shard's tensors, and return the receipt of the shard before it, which is finished by then.

        Raises:
            RuntimeError: another run has taken over the folder, as after the end of the driver, which Ray notices late.
        """
        if _read(self._nonce_file) != self._nonce:
            raise RuntimeError(f"workers must be those of one run; another one writes to {self._nonce_file.parent}")
        before, self._unfinished = self._unfinished, self._maker.make(self._shards[file])
        return [] if before is None else [before.receipt().model_dump_json()]

    def finish(self) -> list[str]:
        """The receipt of the last shard."""
        before, self._unfinished = self._unfinished, None
        return [] if before is None else [before.receipt().model_dump_json()]


def require_shared(job: Job, nonce_file: Path, nonce: str) -> None:
    """Raise unless this node sees the driver's own output folder, and every input as the driver sees it.

    Raises:
        RuntimeError: naming the node and the file.
    """
    node = f"node {socket.gethostname()}"
    if _read(nonce_file) != nonce:
        raise RuntimeError(
            f"every node must see the output folder; {node} does not see {nonce_file.parent} as the driver wrote it. "
            "Put the output on storage that all nodes share"
        )
    for key, place in job.places.items():
        try:
            same = fingerprint(Path(place)).is_copy_of(job.plan.inputs[key])
        except OSError:
            same = False
        if not same:
            raise RuntimeError(
                f"every node must see the inputs; {node} does not see {place} as the driver does. "
                "Put the models on storage that all nodes share, at the same path"
            )


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""
