"""A Ray cluster: actors that make shards on storage that all nodes share. Names travel, never tensors."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import secrets
import socket
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit_ace.checkpoints.fingerprint import fingerprint
from mergekit_ace.engine.events import TensorMade
from mergekit_ace.engine.job import Job, opened
from mergekit_ace.engine.merging import Site
from mergekit_ace.engine.receipt import Receipt, write_whole
from mergekit_ace.engine.shards import Shard
from mergekit_ace.engine.workers.processes import WorkerError
from mergekit_ace.recipe.failures import message_of

LOCAL = "local"
"""The address of a cluster that is to be started on this machine."""
_MOST_CPUS = 2
_ATTEMPTS = 3
_PATIENCE_SECONDS = 600.0
_NONCE = "nonce"


@contextlib.contextmanager
def cluster(job: Job, site: Site, *, address: str, count: int | None, gpus: bool) -> Iterator[RayWorkers]:
    """Actors on a Ray cluster, one a GPU or one for every two CPUs of it; a cluster started here ends with the block.

    Args:
        job: what they get.
        site: where the merge is made.
        address: of the cluster; `local` starts one on this machine.
        count: how many actors; as many as the cluster has resources for if None.
        gpus: whether each has a GPU.

    Raises:
        RuntimeError: Ray is not installed.
        ConnectionError: there is no cluster at the address.
    """
    if importlib.util.find_spec("ray") is None:
        raise RuntimeError("--ray needs Ray, which is not installed. Run: pip install 'mergekit-ace[ray]'")
    ray = _ray()
    outer = ray.is_initialized()
    if not outer:
        ray.init(
            address=None if address == LOCAL else address,
            include_dashboard=False if address == LOCAL else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    nonce = secrets.token_hex(16)
    write_whole(site.stage.receipts / _NONCE, nonce.encode())
    workers = RayWorkers(job, site, nonce, count, gpus)
    try:
        yield workers
    finally:
        workers.dismiss()
        if not outer:
            ray.shutdown()


class Actor:
    """Makes shards in a process of its own on any node; the class of the Ray actors."""

    def __init__(self) -> None:
        self._maker: Any = None
        self._shards: dict[str, Shard] = {}
        self._open = contextlib.ExitStack()

    def prepare(self, job_text: str, nonce_file: str, nonce: str, threads: int) -> None:
        """Look for the shared storage and plan the merge.

        Raises:
            RuntimeError: naming this node, if it does not see the output or an input.
        """
        import torch

        torch.set_num_threads(threads)
        job = Job.model_validate_json(job_text)
        require_shared(job, Path(nonce_file), nonce)
        self._maker = self._open.enter_context(opened(job, None, lambda name, seconds: None))
        self._shards = {shard.file: shard for shard in job.plan.shards}

    def make(self, file: str) -> str:
        """Make a shard and return its receipt."""
        receipt: Receipt = self._maker.make(self._shards[file])
        return receipt.model_dump_json()


def require_shared(job: Job, nonce_file: Path, nonce: str) -> None:
    """Raise unless this node sees the driver's own output folder, and every input as the driver sees it.

    Raises:
        RuntimeError: naming the node and the file.
    """
    node = f"node {socket.gethostname()}"
    try:
        seen = nonce_file.read_text(encoding="utf-8")
    except OSError:
        seen = ""
    if seen != nonce:
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


@dataclass
class RayWorkers:
    """Hands shards to actors as they become free; a shard whose actor or node is lost goes to another one."""

    job: Job
    site: Site
    nonce: str
    count: int | None
    gpus: bool
    elsewhere: bool = True
    _actors: list[Any] = field(default_factory=list)
    _running: dict[Any, tuple[Any, Shard | None]] = field(default_factory=dict)
    _idle: list[Any] = field(default_factory=list)

    @property
    def description(self) -> str:
        """As `Workers.description`."""
        ray = _ray()
        return f"{self._size()} actors of Ray on {sum(node['Alive'] for node in ray.nodes())} nodes"

    def make(self, shards: Sequence[Shard]) -> Generator[Receipt, None, None]:
        """As `Workers.make`.

        Raises:
            WorkerError: naming the shard or the node, and what stopped it.
        """
        ray = _ray()
        lost = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError)
        waiting = list(shards)
        attempts: Counter[str] = Counter()
        for _ in range(min(self._size(), len(shards))):
            self._hire()
        done = 0
        while done < len(shards):
            for reference in self._finished():
                actor, shard = self._running.pop(reference)
                try:
                    answer = ray.get(reference)
                except lost as error:
                    self._actors.remove(actor)
                    if shard is not None:
                        attempts[shard.file] += 1
                        waiting.insert(0, shard)
                    self._require_hope(shard, attempts, error)
                    # What is left of the cluster may have no place for another actor: an idle one goes first.
                    if not self._idle:
                        self._hire()
                    self._hand_out(waiting)
                    continue
                except ray.exceptions.RayTaskError as error:
                    raise WorkerError(message_of(error.cause)) from error
                self._idle.append(actor)
                self._hand_out(waiting)
                if shard is not None:
                    done += 1
                    yield self._receipt(answer)

    def dismiss(self) -> None:
        """End all actors."""
        ray = _ray()
        for actor in self._actors:
            ray.kill(actor)

    def _hand_out(self, waiting: list[Shard]) -> None:
        """Give the shards that wait to the actors that have none."""
        while waiting and self._idle:
            actor, shard = self._idle.pop(), waiting.pop(0)
            self._running[actor.make.remote(shard.file)] = (actor, shard)

    def _receipt(self, answer: str) -> Receipt:
        receipt = Receipt.model_validate_json(answer)
        for tensor in receipt.tensors:
            self.site.watch(TensorMade(tensor.name, receipt.seconds / len(receipt.tensors)))
        return receipt

    def _finished(self) -> list[Any]:
        """The calls that have ended; waits for the first."""
        ray = _ray()
        started = time.monotonic()
        while True:
            finished, _ = ray.wait(list(self._running), num_returns=1, timeout=1.0)
            if finished:
                return list(finished)
            if all(shard is None for _, shard in self._running.values()):
                if time.monotonic() - started > _PATIENCE_SECONDS:
                    raise WorkerError(
                        f"Ray must start a worker within {_PATIENCE_SECONDS:.0f} seconds; the cluster has no "
                        "resources left for one. --resume goes on with the finished shards"
                    )
            else:
                started = time.monotonic()

    def _require_hope(self, shard: Shard | None, attempts: Counter[str], error: Exception) -> None:
        if shard is not None and attempts[shard.file] >= _ATTEMPTS:
            raise WorkerError(
                f"{shard.file} ended its worker {_ATTEMPTS} times, which may be out of memory: {_first_line(error)}. "
                "Give workers more memory; --resume goes on with the finished shards"
            ) from error

    def _hire(self) -> None:
        ray = _ray()
        cpus = self._cpus()
        remote = ray.remote(Actor).options(
            num_cpus=0 if self.gpus else cpus, num_gpus=1 if self.gpus else 0, scheduling_strategy="SPREAD"
        )
        actor = remote.remote()
        self._actors.append(actor)
        nonce_file = str((self.site.stage.receipts / _NONCE).resolve())
        ready = actor.prepare.remote(self.job.model_dump_json(), nonce_file, self.nonce, cpus)
        self._running[ready] = (actor, None)

    def _cpus(self) -> int:
        ray = _ray()
        sizes = [int(node["Resources"].get("CPU", 1)) for node in ray.nodes() if node["Alive"]]
        return max(1, min(_MOST_CPUS, *sizes)) if sizes else 1

    def _size(self) -> int:
        ray = _ray()
        if self.count is not None:
            return self.count
        resources = ray.cluster_resources()
        return max(1, int(resources.get("GPU", 0) if self.gpus else resources.get("CPU", 1) // self._cpus()))


def _ray() -> Any:
    """Ray, an optional dependency whose annotations differ from version to version."""
    return importlib.import_module("ray")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
