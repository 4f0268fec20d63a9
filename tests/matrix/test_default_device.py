"""Merges inside `with torch.device(...)`, as in the multi-GPU worker of mergekit: all tensors are where the inputs are.

The device of the context is `meta`, whose tensors have no values: one that was made there fails what uses it.
`tests/device` has every method on a pretended accelerator; here it is one small matrix a route.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mergekit_ace.linalg import bfloat16
from mergekit_ace.linalg.conditioning import condition_number
from mergekit_ace.linalg.low_rank import orthonormal_factors, top_energies
from mergekit_ace.linalg.precision import _multiplies_in_full, inner_product
from mergekit_ace.matrix import merge
from mergekit_ace.matrix.averaging import mean_task_vector
from mergekit_ace.matrix.balanced import merge_without_moments
from mergekit_ace.matrix.expert import Expert, MeasuredMoment
from mergekit_ace.matrix.from_reference import assemble_from_reference
from mergekit_ace.matrix.merge import merge_by_covariance
from mergekit_ace.matrix.options import Bounds
from mergekit_ace.matrix.peers.cart import merge_centered_low_rank
from mergekit_ace.matrix.peers.isotropic import merge_isotropic, merge_isotropic_subspaces
from mergekit_ace.matrix.peers.wudi_adam import descend_interference
from mergekit_ace.matrix.peers.wudi_flow import flow_interference
from mergekit_ace.matrix.presets import ACE, ACE_HEAD, ACE_PUBLISHED
from mergekit_ace.matrix.stored_task_vectors import StoredTaskVectors
from mergekit_ace.matrix.task_vectors import TaskVectors
from tests.linalg.matrices import of_rank, spd
from tests.matrix.experts import adapter_updates, layer, steep_updates
from tests.matrix.test_budget import task_vectors

SOLVED = replace(ACE, correlation_threshold=0.0, bounds=Bounds(retention=True))


def inside(work: Callable[[], Tensor]) -> Tensor:
    with torch.device("meta"):
        return work()


def stored(updates: list[Tensor], dtype: torch.dtype) -> TaskVectors:
    return layer(updates, dtype=dtype)


def measured() -> TaskVectors:
    vectors = layer(steep_updates(20, 12, 2), dtype=torch.float32)
    moment = MeasuredMoment(factor=of_rank(9, 12, 9).float(), error=0.2, tokens=9)
    experts = [replace(expert, measured=moment) for expert in vectors.experts]
    return StoredTaskVectors(vectors.base, experts)


LAYERS = {
    "dense": lambda: layer(steep_updates(30, 40, 3)),
    "tall": lambda: layer(steep_updates(60, 20, 2), dtype=torch.float32),
    "few rows": lambda: layer(steep_updates(8, 64, 3), dtype=torch.float32),
    "adapters": lambda: layer(adapter_updates(264, 260, 3, rank=4), dtype=torch.float32),
    "bfloat16": lambda: task_vectors((64, 48), 0.01, "of a fine-tune", torch.bfloat16),
    "rounded to bfloat16": lambda: layer(
        [update.bfloat16().double() for update in steep_updates(30, 20, 2)], dtype=torch.float32, base_scale=0.0
    ),
    "measured": measured,
}


@pytest.mark.parametrize("options", [ACE, SOLVED, ACE_HEAD, ACE_PUBLISHED], ids=["ace", "solved", "head", "published"])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_merge_by_covariance(kind: str, options: object) -> None:
    if kind == "measured" and options is ACE_PUBLISHED:
        pytest.skip("published takes no measured moments")
    vectors = LAYERS[kind]()
    expected = merge_by_covariance(vectors, options).task_vector  # type: ignore[arg-type]

    def merged() -> Tensor:
        again = StoredTaskVectors(vectors.base, vectors.experts)
        return merge_by_covariance(again, options).task_vector  # type: ignore[arg-type]

    assert torch.equal(inside(merged), expected)


def test_the_merge_from_a_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "assemble", assemble_from_reference)
    vectors = layer(steep_updates(40, 30, 3))
    expected = merge_by_covariance(vectors, SOLVED).task_vector
    assert torch.equal(inside(lambda: merge_by_covariance(vectors, SOLVED).task_vector), expected)


@pytest.mark.parametrize("shape", [(320, 128), (96, 320)], ids=str)
def test_products_in_bfloat16(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat16, "is_faster", lambda *_: True)
    vectors = task_vectors(shape, 0.0003, "of a fine-tune", torch.bfloat16)
    expected = merge_by_covariance(vectors, SOLVED)
    assert expected.products == "bfloat16"
    assert torch.equal(inside(lambda: merge_by_covariance(vectors, SOLVED).task_vector), expected.task_vector)


PEERS: dict[str, Callable[[TaskVectors], Tensor]] = {
    "cart": lambda vectors: merge_centered_low_rank(vectors, rank_fraction=0.2, scale=1.0),
    "iso_c": lambda vectors: merge_isotropic(vectors, mean_over="existing"),
    "iso_cts": lambda vectors: merge_isotropic_subspaces(vectors, common_fraction=0.5, mean_over="all"),
    "tsv_m": merge_without_moments,
    "adam": lambda vectors: descend_interference(vectors, steps=2, learning_rate=1e-3),
    "flow": lambda vectors: flow_interference(vectors, time=300.0, start="sum"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(12, 40), (40, 12)], ids=str)
@pytest.mark.parametrize("peer", PEERS)
def test_other_methods(peer: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    vectors = layer(steep_updates(*shape, 3), dtype=dtype)
    assert torch.equal(inside(lambda: PEERS[peer](vectors)), PEERS[peer](vectors))


def test_the_mean_of_vectors() -> None:
    experts = [Expert(name=str(t), tensor=torch.full((5,), float(t))) for t in (1, 3)]
    base = torch.zeros(5)
    assert inside(lambda: mean_task_vector(base, experts, name="bias")).tolist() == [2.0] * 5


def test_single_steps() -> None:
    factor = torch.linalg.cholesky(spd(40, condition=100.0))
    matrix = of_rank(60, 50, 4)
    expected = orthonormal_factors(matrix.clone(), most=10, tolerance=1e-9)
    numbers = condition_number(factor), top_energies([matrix], 2), inner_product(matrix, matrix)
    with torch.device("meta"):
        assert (condition_number(factor), top_energies([matrix], 2), inner_product(matrix, matrix)) == numbers
        found = orthonormal_factors(matrix.clone(), most=10, tolerance=1e-9)
        _multiplies_in_full.cache_clear()
        assert _multiplies_in_full(matrix.device)
        bfloat16._multiplies.cache_clear()
        assert bfloat16._multiplies(matrix.device) in (True, False)
    assert expected is not None
    assert found is not None
    assert torch.equal(found[0] @ found[1], expected[0] @ expected[1])
