"""Several processes give the bytes of one; what stops one of them is named, and the merge can be gone on with."""

import contextlib
import importlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import Result

from mergekit_ace.engine.driver import Site
from mergekit_ace.engine.workers import processes
from mergekit_ace.engine.workers.processes import Processes
from mergekit_ace.engine.workers.staffing import Staff
from tests.checkpoints import add_adapter, edit_tensors, make_suite
from tests.cli.conftest import Invoke
from tests.cli.test_merge import files

OPTIONS = ("--quiet", "--no-copy-tokenizer", "--out-shard-size", "15K")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Full fine-tunes, one of them damaged, and adapters of one base."""
    folder = tmp_path_factory.mktemp("workers")
    suite = make_suite("llama", folder / "models", experts=2)
    adapters = [
        add_adapter(suite.base.path, folder / f"adapter{t}", rank=2, targets=["q_proj"], seed=t) for t in (0, 1)
    ]
    base = str(suite.base.path)
    experts = [str(expert.path) for expert in suite.experts]
    for name, models in (("full", experts), ("adapters", [f"{base}+{adapter}" for adapter in adapters])):
        document = {"merge_method": "ace", "base_model": base, "models": [{"model": model} for model in models]}
        (folder / f"{name}.yml").write_text(yaml.safe_dump(document))
    return folder


@pytest.mark.parametrize("name", ["full", "adapters"])
def test_two_processes_give_the_bytes_of_one(name: str, folder: Path, tmp_path: Path, invoke: Invoke) -> None:
    options = [*OPTIONS, "--lora-merge-cache", folder / "cache", "--lora-merge-dtype", "float32"]
    one = invoke("merge", folder / f"{name}.yml", tmp_path / "one" / "out", *options)
    assert one.exit_code == 0, one.output
    log = tmp_path / "log.jsonl"
    two = invoke(
        "merge", folder / f"{name}.yml", tmp_path / "two" / "out", *options, "--workers", "2", "--log-json", log
    )
    assert two.exit_code == 0, two.output
    assert files(tmp_path / "one" / "out") == files(tmp_path / "two" / "out")
    assert sorted(os.listdir(tmp_path / "two")) == ["out"]
    events = [json.loads(line) for line in log.read_text().splitlines()]
    (planned,) = (event for event in events if event["event"] == "planned")
    assert planned["workers"].startswith("2 processes")
    made = [event["file"] for event in events if event["event"] == "file"]
    assert sorted(made) == sorted(planned["todo"])
    assert made != sorted(made)  # the dearest first
    assert sum(event["event"] == "tensor" for event in events) == 30
    assert events[-1]["event"] == "done"
    assert events[-1]["tensors"] == 30
    made_in = [event for event in events if event["event"] == "file"]
    for phase in ("reading", "writing"):
        assert events[-1][f"{phase}_seconds"] == pytest.approx(sum(event[f"{phase}_seconds"] for event in made_in))
    assert events[-1]["work_seconds"] == pytest.approx(sum(event["seconds"] for event in made_in))


@pytest.mark.parametrize(("slow", "phase"), [("reading._gather", "reading"), ("tensor_file.os.fsync", "writing")])
def test_a_merge_that_waits_for_its_disk_says_so(
    slow: str, phase: str, folder: Path, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _, function = slow.partition(".")
    owner = importlib.import_module(f"mergekit_ace.engine.{module}")
    *holders, name = function.split(".")
    for holder in holders:
        owner = getattr(owner, holder)
    act, delay = getattr(owner, name), 0.3

    def late(argument: object) -> object:
        time.sleep(delay)
        return act(argument)

    monkeypatch.setattr(owner, name, late)
    log = tmp_path / "log.jsonl"
    result = invoke("merge", folder / "full.yml", tmp_path / "out", "--no-copy-tokenizer", "--log-json", log)
    assert result.exit_code == 0, result.output
    done = json.loads(log.read_text().splitlines()[-1])
    # The file may have been at its end for a moment when the worker began to wait for it.
    assert delay / 2 <= done[f"{phase}_seconds"] <= done["work_seconds"]
    expected = (
        f"workers waited {done['reading_seconds']:.1f} s for inputs and {done['writing_seconds']:.1f} s for output"
    )
    assert expected in result.output


def _killing(at: str) -> Callable[..., object]:
    start = Processes._start

    def started(pool: Processes, number: int, device: str | None) -> object:
        worker = start(pool, number, device)
        if number == 1:
            threading.Timer(0.0, os.kill, (worker.process.pid, getattr(signal, at))).start()
        return worker

    return started


def test_a_worker_that_is_killed_is_named_and_the_rest_is_kept(
    folder: Path, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Processes, "_start", _killing("SIGKILL"))
        result: Result = invoke("merge", folder / "full.yml", out, *OPTIONS, "--workers", "2")
    assert result.exit_code == 1
    assert "worker 2 (process " in result.output
    assert "was killed by SIGKILL while it made model-000" in result.output
    assert not out.exists()
    assert invoke("merge", folder / "full.yml", out, *OPTIONS, "--resume").exit_code == 0
    assert invoke("merge", folder / "full.yml", tmp_path / "whole" / "out", *OPTIONS).exit_code == 0
    assert files(out) == files(tmp_path / "whole" / "out")


def test_an_error_in_a_worker_names_tensor_and_expert(tmp_path: Path, invoke: Invoke) -> None:
    suite = make_suite("llama", tmp_path / "models", experts=2)
    name = "model.layers.2.mlp.up_proj.weight"
    with edit_tensors(suite.experts[1].path / "model.safetensors") as tensors:
        tensors[name][1, 2] = float("nan")
    recipe = tmp_path / "recipe.yml"
    models = [{"model": str(expert.path)} for expert in suite.experts]
    recipe.write_text(yaml.safe_dump({"merge_method": "ace", "base_model": str(suite.base.path), "models": models}))
    result = invoke("merge", recipe, tmp_path / "out", *OPTIONS, "--workers", "2")
    assert result.exit_code == 1
    assert name in result.output
    assert "expert1" in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_workers_end_with_their_driver() -> None:
    import subprocess
    import sys

    worker = subprocess.Popen(
        [sys.executable, "-m", "mergekit_ace.engine.workers.serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    processes._stop(worker)
    assert worker.returncode == 0
    assert worker.stdout is not None
    worker.stdout.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "0"], "must be a number from 1 or auto"),
        (["--memory", "much"], "must be a size such as 24G"),
        (["--memory", "-1G"], "must be a size such as 24G"),
        (["--part", "auto"], "--part auto needs a scheduler's variables"),
    ],
)
def test_a_wrong_command_line_is_a_usage_error(
    arguments: list[str], message: str, folder: Path, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "SKYPILOT_")) or name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)
    result = invoke("merge", folder / "full.yml", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize("flag", ["--cuda", "--multi-gpu"])
def test_a_device_that_is_not_there_is_one_message(
    flag: str, folder: Path, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = invoke("merge", folder / "full.yml", tmp_path / "out", *OPTIONS, flag)
    assert result.exit_code == 1
    assert f"{flag}: torch {torch.__version__} finds no" in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--cuda", "--multi-gpu"])
def test_the_devices_of_a_ray_cluster_need_not_be_on_this_machine(
    flag: str, folder: Path, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, bool, str | None]] = []

    def employ(staff: Staff, site: Site) -> contextlib.AbstractContextManager[Any]:
        options = site.request.options
        asked.append((str(staff.ray), options.device == "cuda", options.device))
        raise RuntimeError("enough")

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(Staff, "__call__", employ)
    result = invoke("merge", folder / "full.yml", tmp_path / "out", *OPTIONS, flag, "--ray", "ray://head:10001")
    assert "enough" in result.output
    assert asked == [("ray://head:10001", True, "cuda")]


def test_a_dry_run_says_the_plan_and_makes_nothing(folder: Path, tmp_path: Path, invoke: Invoke) -> None:
    result = invoke("merge", folder / "full.yml", tmp_path / "out", *OPTIONS, "--dry-run", "--part", "1/2")
    assert result.exit_code == 0, result.output
    assert "files of part 1/2:" in result.output
    assert "model-0000" in result.output
    assert "where --memory keeps it from reading ahead (estimates)" in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [(), ("--part", "1/1")])
def test_what_a_killed_worker_has_left_is_not_published(
    flags: tuple[str, ...], folder: Path, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker of a lost node ends in the middle of a file; another one makes the file again."""
    from mergekit_ace.engine.receipt import temporary_name
    from mergekit_ace.engine.shard_maker import ShardMaker

    assert invoke("merge", folder / "full.yml", tmp_path / "whole", *OPTIONS, *flags).exit_code == 0
    make = ShardMaker.make

    def after_a_lost_worker(maker: ShardMaker, shard: Any) -> Any:
        temporary_name(maker._folder / shard.file).write_bytes(b"the first half")
        return make(maker, shard)

    monkeypatch.setattr(ShardMaker, "make", after_a_lost_worker)
    assert invoke("merge", folder / "full.yml", tmp_path / "again", *OPTIONS, *flags).exit_code == 0
    names = [
        sorted(str(file.relative_to(tmp_path / out)) for file in (tmp_path / out).rglob("*"))
        for out in ("whole", "again")
    ]
    assert names[0] == names[1]


def test_a_summary_ends_the_merge(folder: Path, tmp_path: Path, invoke: Invoke) -> None:
    result = invoke("merge", folder / "full.yml", tmp_path / "out", "--no-copy-tokenizer", "--out-shard-size", "15K")
    assert result.exit_code == 0, result.output
    assert f"{tmp_path / 'out'}: a model, " in result.stdout
    assert "30 tensors (8 averaged, 1 merged as output heads, 21 merged as matrices)" in result.stdout
    assert f"Next: mergekit-ace verify {tmp_path / 'out'}" in result.stdout


def test_a_memory_budget_changes_no_byte_and_says_where_it_is_exceeded(
    folder: Path, tmp_path: Path, invoke: Invoke, caplog: pytest.LogCaptureFixture
) -> None:
    assert invoke("merge", folder / "full.yml", tmp_path / "free" / "out", *OPTIONS).exit_code == 0
    assert "one is read at a time" not in caplog.text
    result = invoke("merge", folder / "full.yml", tmp_path / "tight" / "out", *OPTIONS, "--memory", "10K")
    assert result.exit_code == 0, result.output
    assert "do not fit into a worker's memory (--memory): one is read at a time" in caplog.text
    assert files(tmp_path / "free" / "out") == files(tmp_path / "tight" / "out")


def test_methods_that_draw_numbers_draw_the_same_ones_in_parts(folder: Path, tmp_path: Path, invoke: Invoke) -> None:
    document = yaml.safe_load((folder / "full.yml").read_text())
    document |= {"merge_method": "dare_ties", "parameters": {"density": 0.5, "weight": 0.5}}
    recipe = tmp_path / "dare.yml"
    recipe.write_text(yaml.safe_dump(document))
    options = (*OPTIONS, "--random-seed", "7")
    for part in ("1/2", "2/2"):
        result = invoke("merge", recipe, tmp_path / f"part{part[0]}", *options, "--part", part)
        assert result.exit_code == 0, result.output
    assert invoke("join", tmp_path / "joined" / "out", tmp_path / "part1", tmp_path / "part2").exit_code == 0
    assert invoke("merge", recipe, tmp_path / "whole" / "out", *options).exit_code == 0
    assert files(tmp_path / "joined" / "out") == files(tmp_path / "whole" / "out")
    assert invoke("merge", recipe, tmp_path / "other" / "out", *OPTIONS, "--random-seed", "8").exit_code == 0
    weights = {name for name in files(tmp_path / "whole" / "out") if name.endswith(".safetensors")}
    whole, other = files(tmp_path / "whole" / "out"), files(tmp_path / "other" / "out")
    assert any(whole[name] != other[name] for name in weights)
