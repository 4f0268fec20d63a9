"""A Ray cluster gives the bytes of one process, survives a lost node, and refuses storage that is not shared."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mergekit_ace.engine.driver import Request, merge
from mergekit_ace.engine.events import Event, Planned, ShardMade
from mergekit_ace.engine.receipt import write_whole
from mergekit_ace.engine.workers import ray_actor, ray_cluster
from mergekit_ace.engine.workers.processes import WorkerError
from mergekit_ace.engine.workers.staffing import Staff
from mergekit_ace.recipe.reading import read_recipe
from tests.checkpoints import make_suite
from tests.cli.conftest import Invoke
from tests.cli.test_merge import files

ray = pytest.importorskip("ray")

pytestmark = pytest.mark.filterwarnings("default")  # Ray's own

OPTIONS = ("--quiet", "--no-copy-tokenizer", "--out-shard-size", "15K")


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ray")
    suite = make_suite("llama", folder / "models", experts=2)
    models = [{"model": str(expert.path)} for expert in suite.experts]
    recipe = folder / "recipe.yml"
    recipe.write_text(yaml.safe_dump({"merge_method": "ace", "base_model": str(suite.base.path), "models": models}))
    return recipe


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """Three nodes of one CPU each, on this machine, one process a node."""
    from ray.cluster_utils import Cluster

    variables = {
        "OMP_NUM_THREADS": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_worker_niceness": "0",  # workers that are nice start in minutes where the machine has other work
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        three = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        others = [three.add_node(num_cpus=1) for _ in range(2)]
        three.wait_for_nodes()
        ray.init(address=three.address, log_to_driver=False)
        yield three, others
        ray.shutdown()
        three.shutdown()


@pytest.fixture(scope="module")
def expected(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    from click.testing import CliRunner

    from mergekit_ace.cli import main

    out = tmp_path_factory.mktemp("expected") / "out"
    assert CliRunner().invoke(main, ["merge", str(recipe_file), str(out), *OPTIONS]).exit_code == 0
    return files(out)


def request(recipe_file: Path, out: Path, **fields: Any) -> Request:
    from mergekit.options import MergeOptions

    options = MergeOptions(copy_tokenizer=False, quiet=True)
    return Request(recipe=read_recipe(recipe_file), options=options, out=out, shard_size=15000, **fields)


def test_storage_that_is_not_shared_is_an_error_with_the_nodes_name(
    nodes: Any, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    # What a node sees whose disk of this name is its own.
    monkeypatch.setattr(ray_cluster, "write_whole", lambda file, content: write_whole(file, b"another's"))
    with pytest.raises(WorkerError, match=f"node {socket.gethostname()} does not see {tmp_path}"):
        merge(request(recipe_file, tmp_path / "out"), Staff(workers=1, ray="auto"))
    assert os.listdir(tmp_path) == []


def test_an_input_that_a_node_sees_otherwise_is_named(recipe_file: Path, tmp_path: Path) -> None:
    from mergekit_ace.engine.job import Job
    from mergekit_ace.engine.plan import MergePlan

    (tmp_path / "nonce").write_text("nonce")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    from mergekit_ace.checkpoints.fingerprint import fingerprint

    inputs = {"model/model.safetensors": fingerprint(tmp_path / "model.safetensors")}
    job = Job.model_construct(
        plan=MergePlan.model_construct(inputs=inputs),
        places={name: str(tmp_path / "model.safetensors") for name in inputs},
    )
    ray_actor.require_shared(job, tmp_path / "nonce", "nonce")
    (tmp_path / "model.safetensors").write_bytes(b"otherwi")
    with pytest.raises(RuntimeError, match=r"must see the inputs; node .* does not see .*model\.safetensors"):
        ray_actor.require_shared(job, tmp_path / "nonce", "nonce")


def test_a_shard_that_kills_its_worker_again_and_again_is_named(
    nodes: Any, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dying(ray_cluster.Actor):
        def make(self, file: str) -> list[str]:
            if "00002" in file:
                os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does where memory is out
            return super().make(file)

    monkeypatch.setattr(ray_cluster, "Actor", Dying)
    monkeypatch.setattr(ray_cluster, "_ATTEMPTS", 2)
    with pytest.raises(WorkerError, match=r"model-00002-of-.* ended its worker 2 times"):
        merge(request(recipe_file, tmp_path / "out"), Staff(workers=1, ray="auto"))
    assert not (tmp_path / "out").exists()


DRIVER = """
import os, signal, sys
from pathlib import Path
from mergekit.options import MergeOptions
import mergekit_ace
from mergekit_ace.engine.events import ShardMade
from mergekit_ace.engine.driver import Request, merge
from mergekit_ace.engine.workers.staffing import Staff
from mergekit_ace.recipe.reading import read_recipe

def end(event):
    if isinstance(event, ShardMade):
        os.kill(os.getpid(), signal.SIGKILL)

mergekit_ace.register()
recipe, out, address = sys.argv[1:]
options = MergeOptions(copy_tokenizer=False, quiet=True)
request = Request(recipe=read_recipe(Path(recipe)), options=options, out=Path(out), shard_size=15000)
merge(request, Staff(workers=1, ray=address), end)
"""


def test_a_driver_that_is_killed_is_gone_on_with(
    nodes: Any, recipe_file: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """It is the workers that leave the receipts: also of a file that the driver never heard of."""
    three, _ = nodes
    out = tmp_path / "out"
    driver = subprocess.run(
        [sys.executable, "-c", DRIVER, str(recipe_file), str(out), three.address], capture_output=True, check=False
    )
    assert driver.returncode == -signal.SIGKILL, driver.stderr.decode()
    assert not out.exists()
    receipts = list((tmp_path / "out.partial" / "receipts").glob("*.json"))
    outcome = merge(request(recipe_file, out, resume=True), Staff())
    assert outcome.taken >= len(receipts) >= 1
    assert files(out) == expected


def test_three_nodes_give_the_bytes_of_one_process_also_if_one_is_lost_in_mid_merge(
    nodes: Any, recipe_file: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """The cluster has a node less afterwards."""
    three, others = nodes
    lost: list[str] = []

    def lose(event: Event) -> None:
        if isinstance(event, Planned):
            assert event.workers == "3 actors of Ray on 3 nodes"
        if isinstance(event, ShardMade) and not lost:
            lost.append(event.receipt.file)
            three.remove_node(others[0], allow_graceful=False)

    merge(request(recipe_file, tmp_path / "out"), Staff(workers="auto", ray="auto"), lose)
    assert lost
    assert files(tmp_path / "out") == expected


def test_the_last_shard_of_a_lost_node_goes_to_an_idle_actor(
    nodes: Any, recipe_file: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No other actor finds a place on what is left. The last test that needs the third node."""
    _, others = nodes
    doomed, waits, finished = others[1].node_id, tmp_path / "waits", tmp_path / "finished"

    class Last(ray_cluster.Actor):
        def make(self, file: str) -> list[str]:
            if ray.get_runtime_context().get_node_id() == doomed:
                waits.touch()
                while not finished.exists():
                    time.sleep(0.05)
                os.kill(os.getppid(), signal.SIGKILL)  # the node's own process, and all that it started
                time.sleep(60.0)
            while not waits.exists():
                time.sleep(0.05)
            return super().make(file)

    made: list[str] = []

    def follow(event: Event) -> None:
        if isinstance(event, ShardMade):
            made.append(event.receipt.file)
            if len(made) == len(expected_shards) - 1:
                finished.touch()

    expected_shards = [name for name in expected if name.endswith(".safetensors")]
    monkeypatch.setattr(ray_cluster, "Actor", Last)
    monkeypatch.setattr(ray_cluster, "_PATIENCE_SECONDS", 90.0)
    merge(request(recipe_file, tmp_path / "out"), Staff(workers="auto", ray="auto"), follow)
    assert len(made) == len(expected_shards)
    assert files(tmp_path / "out") == expected


def test_without_ray_the_extra_is_named(
    recipe_file: Path, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = ray_cluster.importlib.util.find_spec
    monkeypatch.setattr(ray_cluster.importlib.util, "find_spec", lambda name: None if name == "ray" else find(name))
    result = invoke("merge", recipe_file, tmp_path / "out", *OPTIONS, "--ray")
    assert result.exit_code == 1
    assert "pip install 'mergekit-ace[ray]'" in result.output
