"""A long merge: memory stays flat, threads do not disturb one another, two devices give the bytes of one."""

import contextlib
import gc
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mergekit import multigpu_executor
from mergekit.merge_methods import merge_tensors

import mergekit_ace
from tests.checkpoints import make_suite, read_tensors
from tests.commands import mergekit_yaml

mergekit_ace.register()


def layer_inputs(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(96, 64, generator=generator)
    return [base, *(base + 0.01 * torch.randn(96, 64, generator=generator) for _ in range(3))]


def merged(seed: int) -> torch.Tensor:
    return merge_tensors(layer_inputs(seed), "ace", base_index=0, name=f"model.layers.{seed}.up_proj.weight")


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_a_thousand_layers_leave_nothing_behind() -> None:
    for seed in range(50):
        merged(seed)
    before, peak_before = live_tensors(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(1000):
        merged(seed)
    assert live_tensors() <= before
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_before
    # Inputs of one layer are 100 KB: a leak of one tensor a layer would be 25 MB. In KiB.
    assert grown < 8 * 1024


def test_threads_get_the_same_bytes() -> None:
    alone = [merged(seed) for seed in range(24)]
    together: dict[int, torch.Tensor] = {}

    def work(seeds: range) -> None:
        for seed in seeds:
            together[seed] = merged(seed)

    threads = [threading.Thread(target=work, args=(range(start, 24, 4),)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(together[seed], alone[seed]) for seed in range(24))


class CpuAsAccelerator:
    """Stands in for `torch.cuda` where the executor asks it to wait."""

    @staticmethod
    def synchronize(device: torch.device) -> None:
        assert device.type == "cpu"


def on_two_devices(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """mergekit's multi-GPU executor on two devices that are both the CPU; returns the names of the threads it used."""
    used: list[str] = []

    @contextlib.contextmanager
    def stream(_stream: object) -> Iterator[None]:
        used.append(threading.current_thread().name)
        yield

    monkeypatch.setattr(multigpu_executor, "get_torch_accelerator_type", lambda: "cpu")
    monkeypatch.setattr(multigpu_executor, "get_torch_accelerator_count", lambda: 2)
    monkeypatch.setattr(multigpu_executor, "get_torch_accelerator_module", lambda _name: CpuAsAccelerator)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: device)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    return used


@pytest.mark.parametrize("method", ["ace", "tsv_m"])
def test_two_devices_give_the_bytes_of_one(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = make_suite("llama", tmp_path / "suite", experts=3)
    recipe = {
        "merge_method": method,
        "base_model": str(suite.base.path),
        "models": [{"model": str(expert.path)} for expert in suite.experts],
    }
    one = read_tensors(mergekit_yaml(recipe, tmp_path / "one"))
    used = on_two_devices(monkeypatch)
    two = read_tensors(mergekit_yaml(recipe, tmp_path / "two", "--multi-gpu"))
    assert len(set(used)) == 2
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
