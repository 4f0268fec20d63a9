"""A merge that is killed, stopped, or runs out of something, at any moment.

An audit hook counts what the merge does to the file system around its output, tensor by tensor and file by file, and
ends it at the n-th event, so that "any moment" is the same in every run of the test.
"""

import json
import os
import random
import signal
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
import yaml

from tests.checkpoints import make_suite
from tests.forks import ForkServer

IMPORTS = """
import torch
import mergekit.merge, mergekit_ace.cli.merge, mergekit_ace.methods
import transformers.models.llama.configuration_llama
"""

# One merge that ends at the n-th event. Events: what Python does to files whose path holds `out`, and every tensor.
MERGE = """
import os, signal, sys, threading
import torch
torch.set_num_threads(1)
# As a terminal leaves them. Tests that were started in the background would pass on that SIGINT is ignored, and those
# started by nohup that SIGHUP is; the command does well to leave that alone.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from mergekit_ace.cli import main
from mergekit_ace.recipe.plan import PlannedTensor

events = 0
counting = threading.Lock()  # files are finished in a thread of their own
def end():
    if kind == "disk full":
        raise OSError(28, "No space left on device")
    if kind == "out of memory":
        raise MemoryError
    os.kill(os.getpid(), getattr(signal, kind))
def note(event, arguments):
    global events
    touched = any(isinstance(argument, (str, os.PathLike)) and out in str(argument) for argument in arguments)
    if event == "merge.tensor" or (event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir") and touched):
        with counting:
            events += 1
            now = events == at
        if now:
            end()
sys.addaudithook(note)
merge_tensor = PlannedTensor.merge
def merge(self, tensors):
    sys.audit("merge.tensor", self.name)
    return merge_tensor(self, tensors)
PlannedTensor.merge = merge
try:
    main(["merge", recipe, out, "--quiet", "--no-copy-tokenizer", "--out-shard-size", "15K", *flags])
finally:
    print(f"EVENTS {events}")
"""

STATUS = {"SIGKILL": -signal.SIGKILL, "SIGTERM": 143, "SIGINT": 130, "SIGHUP": 129, "disk full": 1, "out of memory": 1}
MOMENTS = 3


class KilledMerge:
    """A recipe, the hashes of its inputs, and merges of it that end badly."""

    def __init__(self, folder: Path, forks: ForkServer) -> None:
        suite = make_suite("llama", folder / "models", experts=2)
        self.folder = folder
        self.recipe = folder / "recipe.yml"
        models = [{"model": str(expert.path)} for expert in suite.experts]
        self.recipe.write_text(
            yaml.safe_dump({"merge_method": "ace", "base_model": str(suite.base.path), "models": models})
        )
        self._forks = forks
        self.inputs = hashes(folder / "models")
        status, output = self.merge(folder / "expected" / "out", "nothing", 0)
        assert status == 0, output
        self.events = int(output.splitlines()[-1].removeprefix("EVENTS "))
        self.expected = hashes(folder / "expected" / "out")

    def merge(self, out: Path, kind: str, at: int, *flags: str) -> tuple[int, str]:
        names = {"recipe": str(self.recipe), "out": str(out), "kind": kind, "at": at, "flags": flags}
        return self._forks.run("".join(f"{name} = {value!r}\n" for name, value in names.items()) + MERGE)

    def run(self, snippet: str) -> tuple[int, str]:
        return self._forks.run(snippet)


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def killable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KilledMerge]:
    folder = tmp_path_factory.mktemp("killed")
    with ForkServer(
        sys.executable, IMPORTS, Path(__file__).parents[2], {**os.environ, "OMP_NUM_THREADS": "1"}
    ) as forks:
        yield KilledMerge(folder, forks)


def unfinished(out: Path) -> bool | None:
    """Whether what lies beside an output can be gone on with; None if nothing does."""
    partial = out.with_name(out.name + ".partial")
    return any((partial / "receipts").glob("*.json")) if partial.exists() else None


def moments(killable: KilledMerge, seed: str) -> list[int]:
    """Early and late events, where folders are made and renamed, and some in between."""
    between = random.Random(seed).sample(range(3, killable.events - 5), MOMENTS)
    return [2, *sorted(between), *range(killable.events - 4, killable.events + 1)]


def assert_rerun(killable: KilledMerge, out: Path, *flags: str) -> None:
    status, output = killable.merge(out, "nothing", 0, "--resume", *flags)
    assert status == 0, output
    assert hashes(out) == killable.expected
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", STATUS)
def test_no_folder_looks_whole_but_is_not(kind: str, killable: KilledMerge, tmp_path: Path) -> None:
    endings = set()
    for at in moments(killable, kind):
        out = tmp_path / str(at) / "out"
        out.parent.mkdir()
        status, output = killable.merge(out, kind, at)
        whole = out.exists()
        endings.add((status, whole))
        if whole:  # the last events are after the rename
            assert hashes(out) == killable.expected, (at, output)
        else:
            assert status == STATUS[kind], (at, output)
            assert kind == "SIGKILL" or unfinished(out) in (None, True), (at, output)
        assert {path.name for path in out.parent.iterdir()} <= {"out", "out.partial"}
        assert "Traceback" not in output, (at, output)
        assert hashes(killable.folder / "models") == killable.inputs
        assert_rerun(killable, out, *(["--overwrite"] if whole else []))
    assert (STATUS[kind], False) in endings


@pytest.mark.parametrize("kind", ["SIGKILL", "SIGTERM", "disk full"])
def test_what_was_there_stays_until_its_successor_is_whole(kind: str, killable: KilledMerge, tmp_path: Path) -> None:
    for at in moments(killable, f"overwrite {kind}"):
        out = tmp_path / str(at) / "out"
        out.mkdir(parents=True)
        (out / "config.json").write_text("old")
        old = hashes(out)
        killable.merge(out, kind, at, "--overwrite")
        if out.exists():
            assert hashes(out) in (old, killable.expected), at
        else:  # killed between the two renames: the next run puts it back before it does anything else
            assert kind == "SIGKILL"
            assert hashes(out.parent / "out.partial" / "previous") == old
            status, output = killable.merge(out, "nothing", 0)
            assert status == 1
            assert "Pass --resume" in output
            assert hashes(out) == old
        assert_rerun(killable, out, "--overwrite")


@pytest.mark.parametrize("flags", [(), ("--async-write",)], ids=str)
def test_a_write_that_fails_leaves_nothing(flags: tuple[str, ...], killable: KilledMerge, tmp_path: Path) -> None:
    """The operating system itself refuses: no file may grow beyond 12 kB."""
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (12000, 12000))\n"
    names = {"recipe": str(killable.recipe), "out": str(tmp_path / "out"), "kind": "nothing", "at": 0, "flags": flags}
    status, output = killable.run(limit + "".join(f"{name} = {value!r}\n" for name, value in names.items()) + MERGE)
    assert status == 1, output
    assert "File too large" in output
    assert "Traceback" not in output
    assert not (tmp_path / "out").exists()
    assert unfinished(tmp_path / "out") in (None, True)
    assert_rerun(killable, tmp_path / "out")


@pytest.mark.parametrize("kind", ["SIGTERM", "SIGKILL"])
def test_threads_that_write_are_stopped_too(kind: str, killable: KilledMerge, tmp_path: Path) -> None:
    for at in moments(killable, f"threads {kind}")[:MOMENTS]:
        out = tmp_path / str(at) / "out"
        out.parent.mkdir()
        status, output = killable.merge(out, kind, at, "--async-write")
        assert status == STATUS[kind], (at, output)
        assert not out.exists()
        assert_rerun(killable, out)


def test_a_part_is_whole_or_not_there_too(killable: KilledMerge, tmp_path: Path) -> None:
    for at in moments(killable, "part")[::3]:
        out = tmp_path / str(at) / "out"
        out.parent.mkdir()
        killable.merge(out, "SIGKILL", at, "--part", "1/1")
        manifest = out / "part.json"
        receipts = json.loads(manifest.read_text())["receipts"] if out.exists() else []
        assert not out.exists() or sum(len(receipt["tensors"]) for receipt in receipts) == 30
