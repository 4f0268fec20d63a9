"""The two routes to the same solution: the [n, n] system, and the rows that all task vectors have together."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from mergekit_ace.matrix import merge
from mergekit_ace.matrix.dense import assemble_dense
from mergekit_ace.matrix.merge import merge_by_covariance
from mergekit_ace.matrix.options import CovarianceOptions, SecondMoment
from mergekit_ace.matrix.presets import ACE, ACE_PUBLISHED, with_epsilon
from mergekit_ace.matrix.row_factors import row_factors
from mergekit_ace.matrix.workload import by_stacked_rows, multiply_adds, working_numbers
from tests.matrix.experts import adapter_updates, in_float64, layer, steep_updates
from tests.reference.ace import AceOptions, ace

PUBLISHED = ACE_PUBLISHED
CENTERED, PLAIN = SecondMoment(centered=True), SecondMoment(trace_normalized=False)
VARIANTS = [
    PUBLISHED,
    replace(PUBLISHED, gate=None),
    replace(PUBLISHED, second_moment=CENTERED, structural_prior=False, gate=None),
    CovarianceOptions(second_moment=PLAIN),
    CovarianceOptions(second_moment=SecondMoment(), structural_prior=True),
]
LAYERS: dict[str, Callable[[], list[Tensor]]] = {
    "wide": lambda: steep_updates(40, 300, 4, spread=2.0),
    "adapters": lambda: adapter_updates(280, 320, 3, rank=12),
    "adapters, tall": lambda: adapter_updates(400, 260, 3, rank=8),
    "wide adapters": lambda: adapter_updates(256, 900, 3, rank=8),
}


def by_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "assemble", assemble_dense)


@pytest.mark.parametrize("options", VARIANTS, ids=range(len(VARIANTS)))
@pytest.mark.parametrize("kind", LAYERS)
def test_both_routes_agree(kind: str, options: CovarianceOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    task_vectors = layer(LAYERS[kind]())
    factors = row_factors(task_vectors, center=options.second_moment.centered)
    assert factors is not None
    assert len(factors.rows) < task_vectors.shape[1]
    few_rows = merge_by_covariance(task_vectors, options)
    by_dense(monkeypatch)
    dense = merge_by_covariance(task_vectors, options)
    error = torch.linalg.norm(few_rows.task_vector - dense.task_vector) / torch.linalg.norm(dense.task_vector)
    # The dense system of few rows has the ridge as its smallest eigenvalues, hence loses digits to its conditioning.
    assert error < 1e-9
    assert few_rows.ridge == pytest.approx(dense.ridge)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_few_rows_against_the_literal_steps(dtype: torch.dtype) -> None:
    task_vectors = layer(steep_updates(40, 300, 4, spread=3.0), dtype=dtype)
    merged = merge_by_covariance(task_vectors, PUBLISHED).task_vector.double()
    exact = ace(in_float64(task_vectors), AceOptions())
    error = torch.linalg.norm(merged - exact) / torch.linalg.norm(exact)
    assert error < (1e-9 if dtype == torch.float64 else 2e-5)


def test_adapters_in_float32_are_seen_through_their_rounding() -> None:
    task_vectors = layer(adapter_updates(300, 280, 3, rank=16), dtype=torch.float32)
    factors = row_factors(task_vectors, center=True)
    assert factors is not None
    assert len(factors.rows) <= 3 * 17
    options = replace(PUBLISHED, refinement=None)
    merged = merge_by_covariance(task_vectors, options).task_vector.double()
    exact = ace(in_float64(task_vectors), AceOptions(spectral_fraction=0.0))
    # The difference of two float32 weights of size 0.1 is itself known to no more than that.
    rounding = 2 * torch.finfo(torch.float32).eps * torch.linalg.norm(task_vectors.base).double()
    assert torch.linalg.norm(merged - exact) < 3 * rounding


def test_adapters_rounded_to_bfloat16_are_of_full_rank() -> None:
    assert row_factors(layer(adapter_updates(300, 280, 3, rank=16), dtype=torch.bfloat16), center=True) is None


@pytest.mark.parametrize(("m", "n", "experts"), [(300, 280, 3), (40, 300, 4), (40, 160, 4), (40, 161, 4), (30, 300, 9)])
def test_full_fine_tunes_take_the_route_that_is_counted_for_them(m: int, n: int, experts: int) -> None:
    factors = row_factors(layer(steep_updates(m, n, experts)), center=True)
    assert (factors is not None) == by_stacked_rows(m, n, experts)


def test_few_rows_take_less_memory_and_arithmetic_than_the_same_layer_with_more_experts() -> None:
    assert working_numbers(512, 4096, 2) < working_numbers(512, 4096, 8) == working_numbers(512, 4096, 32)
    assert 4 * multiply_adds(512, 4096, 2) < multiply_adds(512, 4096, 8)


def one_fully_shrunk() -> list[Tensor]:
    """The second moment of few orthogonal rows is a multiple of the identity as far as they can tell."""
    return [steep_updates(8, 64, 1)[0], torch.eye(8, 64, dtype=torch.float64)]


RESPONDING = {**LAYERS, "one fully shrunk": one_fully_shrunk}


@pytest.mark.parametrize("ridge", ["auto", 1e-6, 1e3])
@pytest.mark.parametrize("kind", [*LAYERS, "one fully shrunk"])
def test_few_rows_respond_as_their_numerator_does(
    kind: str, ridge: float | Literal["auto"], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(with_epsilon(ACE, ridge), correlation_threshold=0.0)
    updates = RESPONDING[kind]()
    few_rows = merge_by_covariance(layer(updates), options)
    by_dense(monkeypatch)
    dense = merge_by_covariance(layer(updates), options)
    assert few_rows.retention == pytest.approx(dense.retention, rel=1e-8)
