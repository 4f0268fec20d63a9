"""mergekit's own multi-GPU executor, on two pretended devices: the bytes of the CPU."""

import contextlib
import queue
import re
import threading
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit import merge, merge_methods
from mergekit.graph import TaskHandle
from mergekit.merge_methods.base import TensorGroup
from mergekit.multigpu_executor import MultiGPUExecutor
from packaging.version import Version

import mergekit_ace
from mergekit_ace.mergekit_internals import ExecuteMergeMethodTask, GatherTensors, LoadTensor, SaveTensor
from mergekit_ace.methods.layerwise import LayerwiseMethod
from tests.checkpoints import Suite, make_suite, read_tensors
from tests.commands import mergekit_yaml
from tests.device.pretended import AVAILABLE, PretendedAccelerator

pytestmark = [
    pytest.mark.skipif(not AVAILABLE, reason="this torch cannot be given a device in Python"),
    pytest.mark.skipif(
        Version(version("safetensors")) < Version("0.6.1"),
        reason="it makes tensors on the default device by a constructor that no pretended device sees",
    ),
]

mergekit_ace.register()


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    return make_suite("llama", tmp_path_factory.mktemp("suite"), experts=3)


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedAccelerator]:
    """Two devices; what the executor asks of `torch.cuda` for each of its threads opens the thread's mode."""
    with PretendedAccelerator() as pretended:

        @contextlib.contextmanager
        def stream(device: torch.device) -> Iterator[None]:
            threads[threading.current_thread().name] = str(device)
            with pretended.mode():
                yield

        threads: dict[str, str] = {}
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: device)
        monkeypatch.setattr(torch.cuda, "stream", stream)
        yield pretended
        assert sorted(threads.values()) == ["gpu:0", "gpu:1"]


class EveryResult(MultiGPUExecutor):
    """mergekit's executor, made to wait for the results that it loses: those in its queue when all devices are done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        results = self.task_completion_queue

        class AfterTheQueue(threading.Event):
            def set(self) -> None:
                while not results.empty():
                    time.sleep(0.01)
                super().set()

        self.done_event = AfterTheQueue()


class WithoutOneExpert(MultiGPUExecutor):
    """mergekit's executor as on a busy machine: of one tensor, all results are lost but the last expert's weights."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

        def is_lost(handle: TaskHandle) -> bool:
            task = handle.task()
            if isinstance(task, SaveTensor):
                return task.tensor_name == LOST_TENSOR
            if isinstance(task, ExecuteMergeMethodTask):
                return task.output_weight.name == LOST_TENSOR
            if isinstance(task, GatherTensors):
                return all(weight.name == LOST_TENSOR for weight in task.weight_info.values())
            return isinstance(task, LoadTensor) and task.tensor == LOST_TENSOR and task.model != lost_expert

        merges = [task for task in self.universe.tasks if isinstance(task, ExecuteMergeMethodTask)]
        lost_expert = max(set(merges[0].model_order) - {merges[0].base_model}, key=str)
        universe = self.universe

        class Losing(queue.Queue[tuple[int, Any]]):
            def put(self, item: tuple[int, Any], block: bool = True, timeout: float | None = None) -> None:
                if not is_lost(TaskHandle(universe, item[0])):
                    super().put(item, block, timeout)

        self.task_completion_queue = Losing()


LOST_TENSOR = "model.layers.0.mlp.up_proj.weight"


def recipe_of(method: str, suite: Suite) -> dict[str, Any]:
    return {
        "merge_method": method,
        "base_model": str(suite.base.path),
        "models": [{"model": str(expert.path)} for expert in suite.experts],
    }


@pytest.mark.parametrize("method", mergekit_ace.METHODS, ids=lambda method: method.name)
def test_two_devices_give_the_bytes_of_the_cpu(
    method: LayerwiseMethod,
    suite: Suite,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = recipe_of(method.name, suite)
    expected = read_tensors(mergekit_yaml(recipe, tmp_path / "cpu"))
    accelerator = request.getfixturevalue("accelerator")
    monkeypatch.setattr(merge, "MultiGPUExecutor", EveryResult)
    merged = read_tensors(mergekit_yaml(recipe, tmp_path / "devices", "--multi-gpu"))
    assert accelerator.peak > 0
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_results_that_mergekit_loses_are_an_error(
    suite: Suite, tmp_path: Path, accelerator: PretendedAccelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "MultiGPUExecutor", WithoutOneExpert)
    with pytest.raises(RuntimeError, match=rf"{re.escape(LOST_TENSOR)}: .* is missing.*--multi-gpu lost") as error:
        mergekit_yaml(recipe_of("ace", suite), tmp_path / "devices", "--multi-gpu")
    assert str(suite.experts[-1].path) in str(error.value)
    assert str(suite.experts[0].path) not in str(error.value)


def test_a_merge_from_python_is_none_of_the_recipes_before_it(suite: Suite, tmp_path: Path) -> None:
    mergekit_yaml(recipe_of("ace", suite), tmp_path / "out")
    tensors = [read_tensors(model.path)[LOST_TENSOR] for model in (suite.base, suite.experts[0])]
    merged = merge_methods.get("ace")([TensorGroup.from_tensors(tensors, base_index=0, name=LOST_TENSOR)])
    assert torch.equal(merged[0], tensors[1])
