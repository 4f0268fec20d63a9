"""How often the host waits for a matrix, and how much a device holds meanwhile."""

import pytest
import torch

from mergekit_ace.linalg import blocks, precision, random_draws
from mergekit_ace.matrix.expert import Expert, MeasuredMoment
from mergekit_ace.matrix.merge import merge_by_covariance
from mergekit_ace.matrix.presets import ACE
from mergekit_ace.matrix.stored_task_vectors import StoredTaskVectors
from mergekit_ace.matrix.workload import unrefined_numbers, working_numbers
from mergekit_ace.methods.ace import Ace
from tests.device.pretended import AVAILABLE, PretendedAccelerator
from tests.family.cases import Case, cases, drawn

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="this torch cannot be given a device in Python")

# Each wait empties the queue of a device, whatever the size of the matrix: small matrices are nothing but waits.
MOST_WAITS = 15
WITH_LOW_RANK = 19
# Adapters whose second moments do not correlate: a decomposition for each of three experts and for the two polar
# factors, each of which is waited for twice (the decomposition, the numerical rank), and the norm of the result.
TASK_SINGULAR_VECTORS = 2 * (3 + 2) + 1
SHAPES = {
    "square": (272, 264),
    "tall": (544, 264),
    "wide": (264, 544),
    "few rows": (60, 1200),
    "few columns": (900, 40),
}
BYTES_OF_SCALARS = 4096


def merged_on_a_device(
    case: Case, shape: tuple[int, int], dtype: torch.dtype, experts: int = 3, rank: int | None = None
) -> PretendedAccelerator:
    random_draws._drawn.cache_clear()
    with PretendedAccelerator():  # a device is asked for its precision once, not once a matrix
        precision._multiplies_in_full(torch.device("gpu:0"))
    base, updated = drawn(experts, *shape, dtype=dtype, rank=rank)
    with PretendedAccelerator() as accelerator:
        on_device = [accelerator.place(tensor, "gpu:0") for tensor in (base, *updated)]
        case.merge(on_device[0], on_device[1:])
    return accelerator


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_host_waits_few_times_for_a_matrix_by_default(shape: tuple[int, int], dtype: torch.dtype) -> None:
    default = next(cases())
    accelerator = merged_on_a_device(default, shape, dtype)
    assert sum(accelerator.waits.values()) <= MOST_WAITS, accelerator.waits
    # Every further expert is waited for once, for the norm of its second moment.
    further = merged_on_a_device(default, shape, dtype, experts=5)
    assert sum(further.waits.values()) <= MOST_WAITS + 2, further.waits


def test_adapters_take_a_few_more() -> None:
    accelerator = merged_on_a_device(next(cases()), SHAPES["square"], torch.float32, rank=3)
    assert sum(accelerator.waits.values()) <= WITH_LOW_RANK + TASK_SINGULAR_VECTORS, accelerator.waits


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("experts", [2, 5])
def test_a_covariance_merge_keeps_the_bound_of_its_memory(shape: tuple[int, int], experts: int) -> None:
    for case in cases():
        if str(case) in ("ace", "ace-preset=published", "actmat", "wudi"):
            accelerator = merged_on_a_device(case, shape, torch.float32, experts)
            bound = 4 * working_numbers(*shape, experts) + BYTES_OF_SCALARS
            assert accelerator.peak <= bound, case


@pytest.mark.parametrize("experts", [2, 5])
def test_an_output_head_keeps_the_bound_of_its_memory(experts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    m, n = 4000, 24
    monkeypatch.setattr(blocks, "_OF_A_PRODUCT", 100 * n)
    monkeypatch.setattr(blocks, "LARGEST_BLOCK", 100 * n)
    base, updated = drawn(experts, m, n, dtype=torch.float32)
    parameters = {item.name: item.default for item in Ace().own_parameters} | {"lambda": 1.0}
    of_heads = Ace().head_parameters(parameters)
    assert of_heads is not None
    with PretendedAccelerator() as accelerator:
        placed = [accelerator.place(tensor, "gpu:0") for tensor in (base, *updated)]
        experts_there = [Expert(name=str(t), tensor=tensor) for t, tensor in enumerate(placed[1:])]
        Ace().merge_matrix(StoredTaskVectors(placed[0], experts_there), of_heads)
    bound = 4 * unrefined_numbers(m, n, experts) + BYTES_OF_SCALARS
    assert 4 * m * n <= accelerator.peak <= bound


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("tokens", [50, 2000])
def test_a_merge_by_measured_moments_keeps_the_bound_of_its_memory(shape: tuple[int, int], tokens: int) -> None:
    base, updated = drawn(3, *shape, dtype=torch.float32)
    n = shape[1]
    factors = [torch.randn(min(tokens, n), n, generator=torch.Generator().manual_seed(t)).bfloat16() for t in range(3)]
    with PretendedAccelerator() as accelerator:
        placed = accelerator.place(base, "gpu:0")
        experts = [
            Expert(
                name=str(t),
                tensor=accelerator.place(tensor, "gpu:0"),
                measured=MeasuredMoment(factor=factors[t], error=0.1, tokens=tokens),
            )
            for t, tensor in enumerate(updated)
        ]
        merge_by_covariance(StoredTaskVectors(placed, experts), ACE)
    # A factor is moved in the format that it is stored in, 2 bytes a number, and then widened.
    moved = 2 * factors[0].numel()
    assert accelerator.peak <= 4 * working_numbers(*shape, 3, measured=True) + moved + BYTES_OF_SCALARS
