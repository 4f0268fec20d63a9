"""Which actor of a Ray cluster makes which shard, and what happens to those of an actor that is lost; without Ray."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from mergekit_ace.engine.receipt import Receipt
from mergekit_ace.engine.shards import Shard
from mergekit_ace.engine.workers import ray_cluster
from mergekit_ace.engine.workers.processes import WorkerError
from mergekit_ace.engine.workers.ray_actor import Actor
from mergekit_ace.engine.workers.ray_cluster import RayWorkers, cpus_each
from tests.engine.receipts import blank_receipt


class RayError(Exception):
    """Ray's own."""


class RayTaskError(RayError):
    """What an actor's method raised."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


def receipt(file: str) -> str:
    return blank_receipt(file).sealed().model_dump_json()


@dataclass
class Handle:
    """An actor as its driver sees it: calls go into a queue, and are answered in turn."""

    number: int
    ray: "FakeRay"
    before: str | None = None

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: self.ray.call(self, method, *arguments))

    def answer(self, method: str, *arguments: str) -> list[str] | None:
        if method == "prepare":
            return None
        before, self.before = self.before, arguments[0] if method == "make" else None
        return [] if before is None else [receipt(before)]


@dataclass
class FakeRay:
    """A cluster of one-CPU nodes; `act` is asked about each call, and may raise what the driver is to get."""

    nodes_: Sequence[int]
    act: Callable[[Handle, str, tuple[str, ...]], None]
    calls: list[tuple[Handle, str, tuple[str, ...]]] = field(default_factory=list)
    made: list[tuple[int, str]] = field(default_factory=list)
    killed: list[int] = field(default_factory=list)
    hired: int = 0
    exceptions: ClassVar[Any] = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": float(size)}} for size in self.nodes_]

    def remote(self, _: type) -> Any:
        def start() -> Handle:
            self.hired += 1
            return Handle(self.hired, self)

        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=start))

    def call(self, handle: Handle, method: str, *arguments: str) -> int:
        self.calls.append((handle, method, arguments))
        return len(self.calls) - 1

    def wait(self, references: Sequence[int], **_: object) -> tuple[list[int], list[int]]:
        return [*references[:1]], [*references[1:]]

    def get(self, reference: int) -> list[str] | None:
        handle, method, arguments = self.calls[reference]
        self.act(handle, method, arguments)
        if method == "make":
            self.made.append((handle.number, arguments[0]))
        return handle.answer(method, *arguments)

    def kill(self, handle: Handle) -> None:
        self.killed.append(handle.number)


SHARDS = [Shard(file=f"model-{number}", tensors=(), costs=(), reads=()) for number in range(1, 6)]


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[RayWorkers, FakeRay]]:
    def started(nodes: Sequence[int], act: Callable[..., None], count: int | None = None) -> tuple[RayWorkers, FakeRay]:
        ray = FakeRay(nodes, act)
        monkeypatch.setattr(ray_cluster, "_ray", lambda: ray)
        job = SimpleNamespace(model_dump_json=lambda: "job")
        site = SimpleNamespace(stage=SimpleNamespace(receipts=Path("receipts")), watch=lambda event: None)
        return RayWorkers(job, site, "nonce", count, gpus=False), ray  # type: ignore[arg-type]

    return started


def files(receipts: Sequence[Receipt]) -> list[str]:
    return sorted(receipt.file for receipt in receipts)


ALL = [shard.file for shard in SHARDS]


def test_every_shard_is_made_once(workers: Any) -> None:
    team, ray = workers([1, 1], lambda *call: None)
    assert files(list(team.make(SHARDS))) == ALL
    assert sorted(file for _, file in ray.made) == ALL
    team.dismiss()
    assert sorted(ray.killed) == [1, 2]


def test_a_lost_actors_shards_are_made_by_another_one_also_the_one_that_it_was_finishing(workers: Any) -> None:
    """An actor that is lost may be out of reach only: it is ended before another one writes its file."""

    def lose(handle: Handle, method: str, arguments: tuple[str, ...]) -> None:
        if handle.number == 1 and handle.before is not None:  # it has merged one, whose receipt is not here
            raise RayError("lost")

    team, ray = workers([1, 1], lose)
    assert files(list(team.make(SHARDS))) == ALL
    (first,) = [file for number, file in ray.made if number == 1]
    assert first in [file for number, file in ray.made if number != 1]
    assert ray.killed == [1]
    team.dismiss()
    assert sorted(ray.killed) == list(range(1, ray.hired + 1))


def test_a_shard_that_ends_its_actor_again_and_again_is_named(workers: Any) -> None:
    def lose(handle: Handle, method: str, arguments: tuple[str, ...]) -> None:
        if arguments[:1] == ("model-3",):
            raise RayError("out of memory\nmore")

    team, ray = workers([1], lose)
    with pytest.raises(WorkerError, match=r"model-3 ended its worker 3 times, .*: out of memory\. Give"):
        list(team.make(SHARDS))
    # The file before it was lost with its worker, and did not end one.
    assert ray.made.count((1, "model-2")) == 1
    assert ray.hired == 3


def test_actors_that_are_lost_before_they_are_ready_are_not_replaced_for_ever(workers: Any) -> None:
    def lose(handle: Handle, method: str, arguments: tuple[str, ...]) -> None:
        if method == "prepare":
            raise RayError("the node has died")

    team, ray = workers([1, 1], lose)
    with pytest.raises(WorkerError, match=r"workers ended before they were ready, 6 times, .*: the node has died"):
        list(team.make(SHARDS))
    team.dismiss()
    assert sorted(ray.killed) == list(range(1, ray.hired + 1))


def test_actors_that_are_lost_now_and_then_do_not_end_a_merge_that_goes_on(workers: Any) -> None:
    lost: list[int] = []

    def lose(handle: Handle, method: str, arguments: tuple[str, ...]) -> None:
        at_start = method == "prepare" and handle.number in (1, 2, 4, 5)
        in_mid_merge = handle.number == 3 and handle.before is not None
        if at_start or in_mid_merge:
            lost.append(handle.number)
            raise RayError("the node has died")

    team, _ = workers([1], lose)
    assert files(list(team.make(SHARDS))) == ALL
    assert lost == [1, 2, 3, 4, 5]


def test_a_cluster_without_a_place_for_any_actor_is_an_error(workers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    team, ray = workers([], lambda *call: None)
    monkeypatch.setattr(ray_cluster, "_PATIENCE_SECONDS", -1.0)
    monkeypatch.setattr(ray, "wait", lambda references, **_: ([], references))
    with pytest.raises(WorkerError, match="the cluster has no resources left for one"):
        list(team.make(SHARDS))
    team.dismiss()
    assert ray.killed == [1]


def test_an_actor_that_cannot_be_ended_keeps_none_of_the_others(workers: Any) -> None:
    team, ray = workers([1, 1], lambda *call: None)
    list(team.make(SHARDS))
    tried = []

    def kill(handle: Handle) -> None:
        tried.append(handle.number)
        raise RayError("no such actor")

    ray.kill = kill
    team.dismiss()
    assert sorted(tried) == [1, 2]


def test_an_error_in_an_actor_ends_the_merge(workers: Any) -> None:
    def fail(handle: Handle, method: str, arguments: tuple[str, ...]) -> None:
        if method == "finish":
            raise RayTaskError(OSError(28, "No space left on device", "model-5"))

    team, _ = workers([1], fail)
    with pytest.raises(WorkerError, match="No space left on device: 'model-5'"):
        list(team.make(SHARDS))


def test_a_worker_of_an_earlier_run_begins_no_file(tmp_path: Path) -> None:
    """Its driver has ended, and Ray has not noticed yet."""
    worker, begun = Actor(), []

    class Maker:
        def make(self, shard: Shard) -> None:
            begun.append(shard.file)

    worker._maker, worker._shards = Maker(), {shard.file: shard for shard in SHARDS}
    worker._nonce, worker._nonce_file = "ours", tmp_path / "nonce"
    worker._nonce_file.write_text("ours")
    worker.make("model-1")
    for takes_over in (lambda: worker._nonce_file.write_text("theirs"), worker._nonce_file.unlink):
        takes_over()
        with pytest.raises(RuntimeError, match=f"another one writes to {tmp_path}"):
            worker.make("model-2")
    assert begun == ["model-1"]


@pytest.mark.parametrize(
    ("nodes", "count", "cpus"),
    [
        ([2], None, 2),
        ([2], 2, 1),  # two that have two CPUs each would not both find a place
        ([4], 2, 2),
        ([3, 3], 3, 1),
        ([0, 8], None, 2),  # a head that makes nothing
        ([1, 8], None, 1),
        ([2], 3, 1),
        ([], None, 2),
    ],
)
def test_actors_have_as_many_cpus_as_they_all_find(nodes: list[int], count: int | None, cpus: int) -> None:
    assert cpus_each(nodes, count) == cpus
