"""Experts that differ from the base by the rounding of a coarser storage format only."""

import pytest
import torch
from mergekit.merge_methods import merge_tensors
from torch import Tensor

import mergekit_ace
from mergekit_ace.matrix.expert import Expert
from mergekit_ace.matrix.storage_rounding import (
    COARSE_FORMATS,
    _first_values,
    _steps,
    expected_rounding_energies,
    first_look,
    rounding_energy,
    storage_floors,
    storage_formats,
)
from mergekit_ace.matrix.stored_task_vectors import StoredTaskVectors

METHODS = [method.name for method in mergekit_ace.METHODS]
BFLOAT16_ONLY = "differs from the base here by rounding to bfloat16 only"
SHAPES = [(48, 32), (32, 48), (24, 96)]


def weights(shape: tuple[int, int], *, seed: int) -> Tensor:
    return 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fine_tuned(base: Tensor, *, size: float = 0.01, seed: int = 5) -> Tensor:
    return base + size * weights((base.shape[0], base.shape[1]), seed=seed)


def formats(*tensors: Tensor) -> list[tuple[torch.dtype, ...]]:
    return storage_formats(tensors, first_look(tensors).tolist())


def rounding_floor(base: Tensor, expert: Tensor) -> tuple[float, torch.dtype | None]:
    of_base, of_expert = formats(base, expert)
    (floor,) = storage_floors(base, of_base, [of_expert])
    return floor


def is_stored_as(tensor: Tensor, storage: torch.dtype) -> bool:
    return storage in formats(tensor)[0]


def expected_rounding_energy(base: Tensor, expert: Tensor) -> float:
    update = float((expert.double() - base.double()).square().sum())
    (energy,) = expected_rounding_energies(base, [expert], formats(expert), [update])
    return energy


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16])
def test_a_copy_in_a_coarser_format_has_no_part_in_the_merge(method: str, storage: torch.dtype) -> None:
    for shape in SHAPES:
        base = weights(shape, seed=1)
        expert, copy = fine_tuned(base), base.to(storage).float()
        merged = merge_tensors([base, expert, copy], method, base_index=0, name="model.layers.0.mlp.up_proj.weight")
        assert torch.equal(merged, expert)


@pytest.mark.parametrize("method", METHODS)
def test_a_bfloat16_copy_of_a_float16_base_has_no_part_in_the_merge(method: str) -> None:
    base = weights((48, 32), seed=1).half()
    expert, copy = fine_tuned(base.float()).bfloat16(), base.bfloat16()
    # as mergekit promotes them
    tensors = [tensor.float() for tensor in (base, expert, copy)]
    merged = merge_tensors(tensors, method, base_index=0, name="model.layers.0.mlp.up_proj.weight")
    assert torch.equal(merged, expert.float())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16])
def test_what_the_base_was_rounded_from_has_no_part_in_the_merge(method: str, storage: torch.dtype) -> None:
    """A base in 16 bits, and an expert that is the model before, in float32 or rounded to float16."""
    for shape in SHAPES:
        original = weights(shape, seed=1)
        base, expert = original.to(storage).float(), fine_tuned(original)
        for copy in [original] + ([original.half().float()] if storage == torch.bfloat16 else []):
            merged = merge_tensors([base, expert, copy], method, base_index=0, name="model.layers.0.mlp.up_proj.weight")
            assert torch.equal(merged, expert)


@pytest.mark.parametrize("size", [3e-5, 3e-4, 1e-3, 3e-3, 1e-2])
def test_a_small_update_of_a_base_in_16_bits_is_none_of_its_rounding(size: float) -> None:
    """Trained in float32 from the stored weights: below 3e-4 all entries of the update are below half a step."""
    base = weights((96, 64), seed=1).bfloat16().float()
    for name, update in (
        ("dense", size * weights((96, 64), seed=5)),
        ("relative", size * base * torch.randn((96, 64), generator=torch.Generator().manual_seed(5))),
        ("one value", torch.full((96, 64), size * 0.05)),
    ):
        assert len(StoredTaskVectors(base, [Expert(name=name, tensor=base + update)])) == 1


def test_the_base_is_named_where_it_was_rounded() -> None:
    original = weights((96, 64), seed=1)
    base = original.bfloat16().float()
    left_out = StoredTaskVectors(base, [Expert(name="before", tensor=original)]).left_out
    assert left_out == {"before": "the base differs from it here by rounding to bfloat16 only"}
    # One entry beyond half a step was trained.
    trained = original.clone()
    trained[3, 4] *= 1.01
    assert StoredTaskVectors(base, [Expert(name="trained", tensor=trained)]).left_out == {}


@pytest.mark.parametrize(("size", "kept"), [(0.0, False), (0.002, True), (0.01, True)])
def test_an_update_above_the_rounding_of_its_format_is_kept(size: float, kept: bool) -> None:
    base = weights((96, 64), seed=1)
    stored = fine_tuned(base, size=size).bfloat16().float()
    task_vectors = StoredTaskVectors(base, [Expert(name="tuned", tensor=stored)])
    assert (len(task_vectors) == 1) is kept
    assert task_vectors.left_out == (
        {} if kept else {"tuned": "differs from the base here by rounding to bfloat16 only"}
    )


def test_who_is_left_out_and_why() -> None:
    base = weights((16, 8), seed=1)
    experts = [
        Expert(name="tuned", tensor=fine_tuned(base)),
        Expert(name="frozen", tensor=base.clone()),
        Expert(name="silenced", tensor=fine_tuned(base, seed=6), weight=0.0),
        Expert(name="half", tensor=base.half().float()),
    ]
    assert StoredTaskVectors(base, experts).left_out == {
        "silenced": "weight 0",
        "frozen": "equal to the base here",
        "half": "differs from the base here by rounding to float16 only",
    }


def test_the_floor_is_the_energy_of_rounding_and_a_tenth() -> None:
    base = weights((96, 64), seed=1)
    energy, storage = rounding_floor(base, fine_tuned(base).bfloat16().float())
    assert storage == torch.bfloat16
    assert energy == pytest.approx(1.1 * float((base.bfloat16().double() - base.double()).square().sum()), rel=1e-9)
    assert rounding_floor(base, fine_tuned(base)) == (0.0, None)
    # a base that was rounded in the same way: the difference holds no rounding of the base
    rounded = base.bfloat16().float()
    assert rounding_floor(rounded, fine_tuned(base).bfloat16().float())[0] < 1e-9 * energy


def test_values_beyond_the_first_look_count() -> None:
    tensor = torch.ones(1, 10_000)
    assert is_stored_as(tensor, torch.bfloat16)
    tensor[0, -1] = 1 + 2**-20
    assert not is_stored_as(tensor, torch.bfloat16)
    assert not is_stored_as(torch.tensor([float("nan")]), torch.float16)
    assert not is_stored_as(torch.tensor([1e6], dtype=torch.bfloat16), torch.float16)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16])
def test_expected_rounding_energy_is_that_of_real_rounding(storage: torch.dtype) -> None:
    base, tuned = weights((200, 300), seed=1), fine_tuned(weights((200, 300), seed=1), size=0.2)
    real = float((tuned.to(storage).double() - tuned.double()).square().sum())
    assert expected_rounding_energy(base, tuned.to(storage).float()) == pytest.approx(real, rel=0.03)
    assert expected_rounding_energy(base, tuned) == 0.0
    # a value that was rounded back to the base's adds nothing
    stored = base.to(storage)
    assert expected_rounding_energy(stored, stored.clone()) == 0.0


def test_a_weight_of_zero_has_the_smallest_step() -> None:
    base = weights((64, 64), seed=1)
    tuned = fine_tuned(base).bfloat16().float()
    tuned[::2] = 0.0
    half = float((tuned[1::2].double() - fine_tuned(base)[1::2].double()).square().sum())
    assert expected_rounding_energy(base, tuned) == pytest.approx(half, rel=0.1)


def test_the_rounding_of_an_update_of_many_steps_is_a_twelfth_of_each_squared() -> None:
    """Both on the grid: weights between 1 and 2, whose neighbors in bfloat16 are `2^-7` apart."""
    generator = torch.Generator().manual_seed(0)
    step = 2.0**-7
    base = (1 + step * torch.randint(40, 80, (200,), generator=generator)).bfloat16()
    expert = (base.float() + step * torch.randint(-30, 31, (200,), generator=generator)).bfloat16()
    expert = expert.float().clamp(1.0, 2 - step).bfloat16()
    assert expected_rounding_energy(base, expert) == pytest.approx(200 * step**2 / 12, rel=1e-6)
    # Padding of the base is no weight, whatever the expert has there: neither counts.
    padded, filled = torch.cat([base, torch.zeros(300).bfloat16()]), torch.cat([expert, torch.zeros(300).bfloat16()])
    assert expected_rounding_energy(padded, filled) == pytest.approx(200 * step**2 / 12, rel=1e-6)


def test_a_change_of_few_values_by_a_step_is_no_rounding() -> None:
    """Less than rounding would leave: of what size the update was cannot be told, so all of it counts."""
    base = (1 + 2.0**-7 * torch.arange(100)).bfloat16()
    expert = base.clone()
    expert[7] += 2.0**-7
    assert expected_rounding_energy(base, expert) == 0.0


def test_steps_are_those_between_neighbors() -> None:
    values = torch.tensor([1.0, 1.5, -2.0, 3.99, 0.0, 2.0**-14, 2.0**-20, -0.3])
    for storage, digits in ((torch.bfloat16, 7), (torch.float16, 10)):
        smallest = torch.finfo(storage).smallest_normal * 2.0**-digits
        powers = [1.0, 1.0, 2.0, 2.0, 0.0, 2.0**-14, 2.0**-20, 0.25]
        expected = [max(power * 2.0**-digits, smallest) for power in powers]
        assert _steps(values, storage).tolist() == expected


def test_which_formats_hold_all_values_of_a_tensor() -> None:
    bf16, fp16 = COARSE_FORMATS
    small = torch.tensor([1.0, -0.5])
    assert formats(small, small.double(), small.half(), small.bfloat16()) == [
        (bf16, fp16),
        (bf16, fp16),
        (bf16, fp16),
        # Its own alone, the coarsest.
        (bf16,),
    ]
    assert formats(torch.tensor([1 + 2**-10]), torch.tensor([1 + 2**-10]).half()) == [(fp16,), (fp16,)]
    assert formats(torch.tensor([2.0**100]), torch.tensor([1 + 2**-12])) == [(bf16,), ()]


def test_the_first_look_is_at_4096_values() -> None:
    for shape in ((10_000,), (10_000, 1), (3, 10_000), (100, 300), (5, 50, 60)):
        values = torch.arange(float(torch.Size(shape).numel())).view(shape)
        assert torch.equal(_first_values(values), torch.arange(4096.0))
    assert _first_values(torch.ones(())).tolist() == [1.0]
    assert len(_first_values(torch.ones(5, 0))) == 0


def test_floors_of_formats() -> None:
    base = weights((96, 64), seed=1)
    lost = {storage: float((base.to(storage).double() - base.double()).square().sum()) for storage in COARSE_FORMATS}
    bf16, fp16 = COARSE_FORMATS
    floors = storage_floors(base, (), [(), (bf16,), (fp16,), (bf16, fp16)])
    assert [storage for _, storage in floors] == [None, bf16, fp16, bf16]
    expected = [0.0, 1.1 * lost[bf16], 1.1 * lost[fp16], 1.1 * lost[bf16]]
    assert [energy for energy, _ in floors] == pytest.approx(expected)
    # A format that the base has is no coarser one, nor is any of a base in 16 bits; what it cannot hold is no floor.
    assert storage_floors(base, (fp16,), [(fp16,), (bf16,)])[0] == (0.0, None)
    assert storage_floors(base.half(), (fp16,), [(bf16,)]) == [(0.0, None)]
    beyond = torch.full((4,), 1e6)
    assert storage_floors(beyond, (), [(fp16,)]) == [(0.0, None)]


def test_the_rounding_of_a_sample_stands_for_all() -> None:
    values = weights((700, 300), seed=3)
    for storage in COARSE_FORMATS:
        real = float((values.to(storage).double() - values.double()).square().sum())
        assert float(rounding_energy(values, storage)) == pytest.approx(real, rel=0.02)
    # All 8 have the step 2^-7 of bfloat16 between 1 and 2.
    assert float(rounding_energy(torch.ones(8), torch.bfloat16)) == pytest.approx(8 * 2.0**-14 / 12)
    assert float(rounding_energy(torch.ones(1), torch.bfloat16)) == pytest.approx(2.0**-14 / 12)
    assert float(rounding_energy(torch.ones(0), torch.bfloat16)) == 0.0
