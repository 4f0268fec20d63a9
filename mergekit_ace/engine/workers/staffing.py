"""How many workers a merge gets, and of what kind."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from mergekit_ace.engine.driver import Site
from mergekit_ace.engine.events import TensorMade
from mergekit_ace.engine.job import Job
from mergekit_ace.engine.memory import free_memory
from mergekit_ace.engine.plan import input_files
from mergekit_ace.engine.shard_maker import OnTensor
from mergekit_ace.engine.workers.inline import inline
from mergekit_ace.engine.workers.processes import Processes
from mergekit_ace.engine.workers.protocol import Workers

_CORES_A_WORKER = 2
"""Of `auto` on a CPU: a merge's products use two threads well, many less so."""


@dataclass(frozen=True, kw_only=True)
class Staff:
    """Who is to make a merge's shards.

    Args:
        workers: how many processes; `auto` for one a GPU, or one for every two cores.
        memory: bytes that all of them may use together on this machine; most of what is free if None.
        ray: the address of a Ray cluster, `auto` for a new one on this machine; None for none.
    """

    workers: int | Literal["auto"] = 1
    memory: int | None = None
    ray: str | None = None

    @contextlib.contextmanager
    def __call__(self, site: Site) -> Iterator[Workers]:
        """The workers for a merge, who are let go at the end of the block."""
        options = site.request.options
        on_gpus = options.device is not None and options.device.startswith("cuda")
        if self.ray is not None:
            from mergekit_ace.engine.workers.ray_cluster import cluster

            count = None if self.workers == "auto" else self.workers
            with cluster(_job(site, self.memory), site, address=self.ray, count=count, gpus=on_gpus) as workers:
                yield workers
            return
        count = self._count(site, on_gpus)
        available = free_memory() if self.memory is None else self.memory
        memory = None if available is None else available // count
        if count == 1:
            with inline(site, memory, on_tensor=_teller(site)) as worker:
                yield worker
            return
        gpus = torch.cuda.device_count() if on_gpus else 0
        devices = [f"cuda:{number % gpus}" if gpus else None for number in range(count)]
        job = site.stage.receipts / "job"
        job.write_text(_job(site, memory).model_dump_json(), encoding="utf-8")
        yield Processes(
            job=job, devices=devices, threads=max(1, torch.get_num_threads() // count), on_tensor=_teller(site)
        )

    def _count(self, site: Site, on_gpus: bool) -> int:
        if self.workers != "auto":
            return self.workers
        if on_gpus:
            return max(1, torch.cuda.device_count())
        return max(1, min(torch.get_num_threads() // _CORES_A_WORKER, len(site.work.shards)))


def _teller(site: Site) -> OnTensor:
    return lambda name, seconds: site.watch(TensorMade(name, seconds))


def _job(site: Site, memory: int | None) -> Job:
    request = site.request
    return Job(
        recipe=request.recipe.text,
        name=request.recipe.name,
        options=request.options.model_dump(),
        plan=site.work,
        folder=str(site.folder.resolve()),
        receipts=str(site.stage.receipts.resolve()),
        directory=os.getcwd(),
        places={key: str(file.absolute()) for key, file in input_files(site.plan).items()},
        memory=memory,
    )
