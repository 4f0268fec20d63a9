"""The pretended accelerator refuses what CUDA refuses, and counts what costs there."""

import pytest
import torch

from tests.device.pretended import AVAILABLE, PretendedAccelerator

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="this torch cannot be given a device in Python")


def test_numbers_are_the_cpus_and_the_device_is_another() -> None:
    ours, theirs = torch.randn(2, 5, 4)
    with PretendedAccelerator() as accelerator:
        left, right = accelerator.place(ours, "gpu:1"), accelerator.place(theirs, "gpu:1")
        product = left @ right.T
        assert product.device == torch.device("gpu:1")
        assert torch.equal(product.cpu(), ours @ theirs.T)
    assert torch.equal(product.cpu(), ours @ theirs.T)


def test_no_device_is_available_outside() -> None:
    with PretendedAccelerator():
        assert torch.accelerator.is_available()
        assert torch.accelerator.device_count() == 2
    assert not torch.accelerator.is_available()
    assert torch.accelerator.device_count() == 0


def test_operands_on_two_devices_are_refused() -> None:
    with PretendedAccelerator() as accelerator:
        here, there = accelerator.place(torch.ones(3), "gpu:0"), accelerator.place(torch.ones(3), "gpu:1")
        for other in (there, torch.ones(3)):
            with pytest.raises(RuntimeError, match="same device"):
                here + other
            with pytest.raises(RuntimeError, match="same device"):
                other.add_(here)
        assert (2 * here + torch.tensor(1.0)).tolist() == [3, 3, 3]  # a number is no stray tensor
        assert here.copy_(there).device == torch.device("gpu:0")


def test_a_generator_of_the_cpu_does_not_fill_a_tensor_of_the_device() -> None:
    generator = torch.Generator().manual_seed(0)
    with PretendedAccelerator():
        torch.randn(3, generator=generator)
        with torch.device("gpu:0"), pytest.raises(RuntimeError, match="generator"):
            torch.randn(3, generator=generator)


def test_waits_are_counted_where_the_host_reads() -> None:
    with PretendedAccelerator() as accelerator:
        here = accelerator.place(torch.eye(3), "gpu:0")
        product = here @ here
        assert not accelerator.waits
        float(product.sum())
        product.tolist()
        torch.linalg.eigh(product)
        product.to("cpu", non_blocking=True)
        torch.tensor([1.0, 2.0]).to("gpu:0")
    assert accelerator.waits == {
        ("outside of the package", "_local_scalar_dense"): 1,
        ("outside of the package", "_to_copy"): 2,
        ("outside of the package", "_linalg_eigh"): 1,
    }


def test_bytes_alive_are_counted_once_a_storage_and_freed() -> None:
    with PretendedAccelerator() as accelerator:
        here = accelerator.place(torch.ones(100), "gpu:0")
        view = here[:50]
        assert accelerator.peak == 0
        doubled = here * 2
        half = doubled.view(10, 10)[0]
        assert accelerator.peak == 400
        del doubled, view
        again = here.double()
        assert accelerator.peak == 400 + 800
        del half, again
        _ = here.double()
    assert accelerator.peak == 400 + 800


def test_what_exceeds_the_capacity_is_out_of_memory() -> None:
    with PretendedAccelerator(capacity=500) as accelerator:
        here = accelerator.place(torch.ones(100), "gpu:0")
        kept = here * 2
        with pytest.raises(torch.OutOfMemoryError):
            here * 2
        del kept
        here * 2


def test_products_may_be_rounded_as_tensor_cores_round_them() -> None:
    entry = 1 + 2**-12
    for tf32, expected in ((False, entry**2), (True, 1.0)):
        with PretendedAccelerator(tf32=tf32) as accelerator:
            here = accelerator.place(torch.full((1, 1), entry), "gpu:0")
            # float32 does not hold the last bit of the square.
            assert (here @ here).item() == pytest.approx(expected, rel=2**-23)
