"""A long merge: memory stays flat, threads do not disturb one another."""

import gc
import resource
import threading

import torch
from mergekit.merge_methods import merge_tensors

import mergekit_ace

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
