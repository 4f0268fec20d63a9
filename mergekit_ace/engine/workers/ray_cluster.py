"""A Ray cluster: actors that make shards on storage that all nodes share. Names travel, never tensors."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import secrets
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergekit_ace.engine.driver import Site
from mergekit_ace.engine.events import TensorMade
from mergekit_ace.engine.job import Job
from mergekit_ace.engine.receipt import Receipt, write_whole
from mergekit_ace.engine.shards import Shard
from mergekit_ace.engine.workers.processes import WorkerError
from mergekit_ace.engine.workers.ray_actor import Actor
from mergekit_ace.recipe.failures import message_of

LOCAL = "local"
"""Ray's address for a cluster that is to be started on this machine, whatever RAY_ADDRESS says."""
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
        if address == LOCAL:
            # Ray's workers are nice, and starve beside other work.
            os.environ.setdefault("RAY_worker_niceness", "0")
        ray.init(
            address=address,
            include_dashboard=False if address == LOCAL else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    workers = RayWorkers(job, site, secrets.token_hex(16), count, gpus)
    try:
        write_whole(site.stage.receipts / _NONCE, workers.nonce.encode())
        yield workers
    except ray.exceptions.RayError as error:
        raise WorkerError(
            f"the Ray cluster was lost: {_first_line(error)}. --resume goes on with the finished shards"
        ) from error
    finally:
        workers.dismiss()
        if not outer:
            ray.shutdown()


def cpus_each(nodes: Sequence[int], count: int | None) -> int:
    """CPUs of an actor: two, or one where a node has no more or `count` actors would not all find two.

    Args:
        nodes: CPUs of each node.
        count: how many actors there are to be; None for as many as find a place.
    """
    sizes = [size for size in nodes if size > 0]
    cpus = min([_MOST_CPUS, *sizes])
    return cpus if count is None or _places(sizes, cpus) >= count else 1


def _places(nodes: Sequence[int], cpus: int) -> int:
    return sum(size // cpus for size in nodes)


@dataclass(eq=False)
class _Hired:
    """An actor."""

    handle: Any
    shards: list[Shard] = field(default_factory=list)
    """Given to it, without a receipt: the last one is being merged, one before it finished."""


@dataclass
class RayWorkers:
    """Hands shards to actors as they become free; a shard whose actor or node is lost goes to another one."""

    job: Job
    site: Site
    nonce: str
    count: int | None
    gpus: bool
    elsewhere: bool = True
    _hired: list[_Hired] = field(default_factory=list)
    _running: dict[Any, _Hired] = field(default_factory=dict)
    _idle: list[_Hired] = field(default_factory=list)
    _losses: Counter[str] = field(default_factory=Counter)
    """By file; of actors that had none yet, since the last one that had, under an empty name."""

    @property
    def description(self) -> str:
        """As `Workers.description`."""
        return f"{self._size()} actors of Ray on {len(self._nodes())} nodes"

    def make(self, shards: Sequence[Shard]) -> Generator[Receipt, None, None]:
        """As `Workers.make`.

        Raises:
            WorkerError: naming the shard or the node, and what stopped it.
        """
        ray = _ray()
        waiting = list(shards)
        for _ in range(min(self._size(), len(shards))):
            self._hire()
        done = 0
        while done < len(shards):
            for reference in self._finished():
                hired = self._running.pop(reference)
                try:
                    answer = ray.get(reference) or []
                except ray.exceptions.RayTaskError as error:
                    raise WorkerError(message_of(error.cause)) from error
                except ray.exceptions.RayError as error:
                    self._lose(hired, waiting, error)
                    continue
                self._losses.pop("", None)
                self._idle.append(hired)
                receipts = [self._receipt(hired, text) for text in answer]
                self._hand_out(waiting)
                done += len(receipts)
                yield from receipts

    def dismiss(self) -> None:
        """End all actors."""
        for hired in self._hired:
            self._end(hired)
        self._hired.clear()

    def _end(self, hired: _Hired) -> None:
        ray = _ray()
        with contextlib.suppress(ray.exceptions.RayError):  # it has ended by itself, or Ray has
            ray.kill(hired.handle)

    def _lose(self, hired: _Hired, waiting: list[Shard], error: Exception) -> None:
        """Let others make what an actor that is lost was given, if that promises anything."""
        self._hired.remove(hired)
        self._end(hired)  # it may be out of reach only, and go on
        waiting[:0] = hired.shards
        file = hired.shards[-1].file if hired.shards else ""
        self._losses[file] += 1
        if self._losses[file] >= (_ATTEMPTS if file else _ATTEMPTS * self._size()):
            what = f"{file} ended its worker" if file else "workers ended before they were ready,"
            raise WorkerError(
                f"{what} {self._losses[file]} times, which may be out of memory: {_first_line(error)}. "
                "Give workers more memory; --resume goes on with the finished shards"
            ) from error
        # What is left of the cluster may have no place for another actor: an idle one goes first.
        if not self._idle:
            self._hire()
        self._hand_out(waiting)

    def _hand_out(self, waiting: list[Shard]) -> None:
        """Give the shards that wait to the actors that have nothing to do; where none waits, they finish their last."""
        for hired in [*self._idle]:
            if waiting:
                shard = waiting.pop(0)
                hired.shards.append(shard)
                call = hired.handle.make.remote(shard.file)
            elif hired.shards:
                call = hired.handle.finish.remote()
            else:
                continue
            self._idle.remove(hired)
            self._running[call] = hired

    def _receipt(self, hired: _Hired, answer: str) -> Receipt:
        receipt = Receipt.model_validate_json(answer)
        hired.shards = [shard for shard in hired.shards if shard.file != receipt.file]
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
            if not any(hired.shards for hired in self._running.values()):
                if time.monotonic() - started > _PATIENCE_SECONDS:
                    raise WorkerError(
                        f"Ray must start a worker within {_PATIENCE_SECONDS:.0f} seconds; the cluster has no "
                        "resources left for one. --resume goes on with the finished shards"
                    )
            else:
                started = time.monotonic()

    def _hire(self) -> None:
        ray = _ray()
        cpus = self._cpus()
        remote = ray.remote(Actor).options(
            num_cpus=0 if self.gpus else cpus, num_gpus=1 if self.gpus else 0, scheduling_strategy="SPREAD"
        )
        hired = _Hired(remote.remote())
        self._hired.append(hired)
        nonce_file = str((self.site.stage.receipts / _NONCE).resolve())
        job = self.job.model_dump_json()
        self._running[hired.handle.prepare.remote(job, nonce_file, self.nonce, cpus, self._neighbours())] = hired

    def _cpus(self) -> int:
        return cpus_each(self._nodes(), self.count)

    def _neighbours(self) -> int:
        """How many actors a node may have at most."""
        places = self._nodes("GPU") if self.gpus else [size // self._cpus() for size in self._nodes()]
        return max(1, min(max(places, default=1), self._size()))

    def _size(self) -> int:
        if self.count is not None:
            return self.count
        return max(1, sum(self._nodes("GPU")) if self.gpus else _places(self._nodes(), self._cpus()))

    def _nodes(self, resource: str = "CPU") -> list[int]:
        """How much of a resource each living node has."""
        return [int(node["Resources"].get(resource, 0)) for node in _ray().nodes() if node["Alive"]]


def _ray() -> Any:
    """Ray, an optional dependency whose annotations differ from version to version."""
    return importlib.import_module("ray")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
