"""mergekit's own multi-GPU executor, on two pretended devices: the bytes of the CPU."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import mergekit_ace
from mergekit_ace.methods.layerwise import LayerwiseMethod
from tests.checkpoints import Suite, make_suite, read_tensors
from tests.commands import mergekit_yaml
from tests.device.pretended import AVAILABLE, PretendedAccelerator

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="this torch cannot be given a device in Python")

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


@pytest.mark.parametrize("method", mergekit_ace.METHODS, ids=lambda method: method.name)
def test_two_devices_give_the_bytes_of_the_cpu(
    method: LayerwiseMethod, suite: Suite, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    recipe = {
        "merge_method": method.name,
        "base_model": str(suite.base.path),
        "models": [{"model": str(expert.path)} for expert in suite.experts],
    }
    expected = read_tensors(mergekit_yaml(recipe, tmp_path / "cpu"))
    accelerator = request.getfixturevalue("accelerator")
    merged = read_tensors(mergekit_yaml(recipe, tmp_path / "devices", "--multi-gpu"))
    assert accelerator.peak > 0
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
