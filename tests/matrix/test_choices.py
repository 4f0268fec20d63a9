"""Which route, reference and precision a matrix gets, each against its own criterion written out."""

import math
import random
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from mergekit_ace.linalg import bfloat16, low_rank
from mergekit_ace.matrix import dense, from_reference, matrix_weights, merge, rough_moments, stacked_rows
from mergekit_ace.matrix.budget import FOLLOWING, PRODUCTS, SHARE_OF_ROUNDING, error_budget
from mergekit_ace.matrix.decision import decide
from mergekit_ace.matrix.diagnostics import diagnostics
from mergekit_ace.matrix.expert import Expert
from mergekit_ace.matrix.merge import merge_by_covariance
from mergekit_ace.matrix.options import Bounds
from mergekit_ace.matrix.presets import ACE, ACE_PUBLISHED, ACTMAT, with_epsilon
from mergekit_ace.matrix.row_factors import row_factors
from mergekit_ace.matrix.second_moment import RegularizedMoment
from mergekit_ace.matrix.stored_task_vectors import StoredTaskVectors
from mergekit_ace.matrix.task_vectors import TaskVectors
from tests.linalg.matrices import of_rank, spd
from tests.matrix.experts import adapter_updates, layer, steep_updates
from tests.matrix.test_budget import task_vectors

SOLVED = replace(ACE, correlation_threshold=0.0, bounds=Bounds(retention=True))


@pytest.mark.parametrize("options", [ACE, ACTMAT], ids=["normalized", "as they are"])
@pytest.mark.parametrize("seed", range(12))
def test_the_reference_leaves_the_smallest_products(seed: int, options: object) -> None:
    """Of `sum_{t != r} w_t (e_t + e_r)`, with `w_t` the squares of the experts' traces in the system."""
    draw = random.Random(seed)
    weights = [draw.choice([1.0, 1.5, 2.0, 4.0]) for _ in range(4)]
    lengths = [draw.choice([0.5, 1.0, 1.1, 3.0]) for _ in range(4)]
    base = torch.zeros(6, 5, dtype=torch.float64)
    experts = [
        Expert(name=str(t), tensor=length * of_rank(6, 5, 5, seed=10 * t), weight=weight)
        for t, (length, weight) in enumerate(zip(lengths, weights, strict=True))
    ]
    vectors = StoredTaskVectors(base, experts)
    e, a = vectors.energies, vectors.shares
    w = [(a[t] * (1.0 if options is ACE else e[t])) ** 2 for t in range(4)]
    products = [sum(w[t] * (e[t] + e[r]) for t in range(4) if t != r) for r in range(4)]
    chosen = from_reference._reference(vectors, decide(vectors, options))  # type: ignore[arg-type]
    assert products[chosen] == pytest.approx(min(products), rel=1e-12)


def test_of_equal_references_the_one_that_weighs_most() -> None:
    base, update = torch.zeros(6, 5, dtype=torch.float64), of_rank(6, 5, 5)
    for weights, heaviest in (((1.0, 2.0), 1), ((2.0, 1.0), 0)):
        experts = [Expert(name=str(t), tensor=update, weight=weight) for t, weight in enumerate(weights)]
        vectors = StoredTaskVectors(base, experts)
        assert from_reference._reference(vectors, decide(vectors, ACE)) == heaviest


def stored(updates: list[Tensor]) -> TaskVectors:
    return layer(updates, dtype=torch.float32)


def test_rows_are_fewer_than_inputs_or_there_are_none() -> None:
    """A full fine-tune and an adapter have the rows of the one and the rank of the other."""
    full = steep_updates(300, 340, 1)[0]
    for rank, few in ((39, True), (40, False)):
        factors = row_factors(stored([full, adapter_updates(300, 340, 1, rank=rank)[0]]), center=False)
        assert (factors is not None) is few
        if factors is not None:
            assert factors.rows.shape == (339, 340)
            assert [rows.block for rows in factors.experts] == [slice(0, 300), slice(300, 339)]
            assert [rows.basis is None for rows in factors.experts] == [True, False]
            assert [rows.mean_row for rows in factors.experts] == [None, None]


def test_adapters_are_as_many_rows_as_their_ranks() -> None:
    vectors = layer(adapter_updates(280, 260, 3, rank=5))
    factors = row_factors(vectors, center=False)
    assert factors is not None
    assert factors.rows.shape == (15, 260)
    for t, rows in enumerate(factors.experts):
        assert rows.basis is not None
        torch.testing.assert_close(rows.basis @ factors.rows[rows.block], vectors.task_vector(t), rtol=0, atol=1e-12)
    # Not looked for where updates are known to be of full rank, nor in small matrices, nor of cores.
    assert row_factors(vectors, center=False, low_rank=0.0) is None
    assert row_factors(layer(adapter_updates(255, 260, 3, rank=5)), center=False) is None
    assert row_factors(layer(adapter_updates(260, 255, 3, rank=5)), center=False) is None
    assert row_factors(layer(adapter_updates(256, 256, 3, rank=5)), center=False) is not None
    # A rank of an experts' part of half the inputs is of no use.
    assert row_factors(stored(adapter_updates(280, 264, 3, rank=44)), center=False) is not None
    assert row_factors(stored(adapter_updates(280, 264, 3, rank=45)), center=False) is None


def test_a_rank_that_is_known_to_be_low_is_not_doubted(monkeypatch: pytest.MonkeyPatch) -> None:
    """No look at a few rows, which may hold more directions than the update has on the whole."""
    vectors = layer(adapter_updates(280, 260, 3, rank=5))
    monkeypatch.setattr(low_rank, "_corner_is_full", lambda rows, most: True)
    assert row_factors(vectors, center=False, low_rank=1.0) is not None
    assert row_factors(vectors, center=False, low_rank=0.1) is not None
    assert row_factors(vectors, center=False) is None


def test_centered_rows_remember_their_means() -> None:
    vectors = layer(steep_updates(8, 64, 3))
    factors = row_factors(vectors, center=True)
    assert factors is not None
    for t, rows in enumerate(factors.experts):
        update = vectors.task_vector(t)
        assert rows.mean_row is not None
        torch.testing.assert_close(rows.mean_row, update.mean(dim=0))
        torch.testing.assert_close(factors.rows[rows.block], update - update.mean(dim=0))
    assert row_factors(layer(steep_updates(8, 24, 3)), center=True) is None
    assert row_factors(layer(steep_updates(8, 25, 3)), center=True) is not None
    assert row_factors(layer(steep_updates(8, 24, 3)), center=False) is None
    plain = row_factors(layer(steep_updates(8, 25, 3)), center=False)
    assert plain is not None
    assert plain.rows.shape == (24, 25)


@pytest.mark.parametrize("epsilon", ["auto", 1e-2])
def test_few_rows_that_are_all_equal_have_no_part_in_the_system(
    epsilon: float | Literal["auto"], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = torch.linspace(-1, 1, 64, dtype=torch.float64)
    vectors = layer([*steep_updates(8, 64, 2), row.repeat(8, 1)], base_scale=0.0)
    options = with_epsilon(replace(ACE_PUBLISHED, gate=None), epsilon)
    factors = row_factors(vectors, center=True)
    assert factors is not None
    few = merge_by_covariance(vectors, options)
    monkeypatch.setattr(merge, "assemble", dense.assemble_dense)
    expected = merge_by_covariance(vectors, options)
    assert few.moments[2].trace == expected.moments[2].trace == 0.0
    torch.testing.assert_close(few.task_vector, expected.task_vector, rtol=0, atol=1e-9)


def in_bfloat16(monkeypatch: pytest.MonkeyPatch, *, smallest: int = 0) -> None:
    """As on a processor that multiplies bfloat16 faster; only CPUs are known."""
    monkeypatch.setattr(
        bfloat16, "is_faster", lambda device, *sides: device.type == "cpu" and min(sides) >= smallest and len(sides) > 1
    )


def test_products_of_weights_are_rounded_where_their_error_is_known_to_be_small(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_bfloat16(monkeypatch)
    for size, rounded in ((0.001, True), (0.05, False)):
        vectors = task_vectors((320, 160), size, "of a fine-tune", torch.bfloat16)
        allowed = PRODUCTS * error_budget(vectors, "auto") / FOLLOWING
        e, a = vectors.energies, vectors.shares
        largest = max(range(3), key=lambda t: e[t])
        expected = 1.66e-3 * math.sqrt(sum(a[t] * (e[t] + e[largest]) for t in range(3) if t != largest) / 3)
        assert (expected <= allowed) is rounded
        assert matrix_weights.allowed_error(vectors, ACE) == pytest.approx(allowed if rounded else 0.0)
        assert matrix_weights.allowed_error(vectors, replace(ACE, precision="full")) == 0.0
    in_bfloat16(monkeypatch, smallest=161)
    assert matrix_weights.allowed_error(task_vectors((320, 160), 0.001, "steep", torch.bfloat16), ACE) == 0.0


def test_moments_are_rounded_in_tall_matrices_of_small_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    in_bfloat16(monkeypatch)
    vectors = task_vectors((320, 160), 0.0003, "of a fine-tune", torch.bfloat16)
    decision = decide(vectors, ACE)
    half = math.sqrt(0.5) * PRODUCTS * error_budget(vectors, "auto") / FOLLOWING
    assert rough_moments.allowed_error(vectors, ACE, decision) == pytest.approx(half)
    assert rough_moments.allowed_error(vectors, replace(ACE, precision="full"), decision) == 0.0
    assert rough_moments.allowed_error(vectors, ACE, replace(decision, low_rank=0.5)) == 0.0
    less_tall = task_vectors((319, 160), 0.0003, "of a fine-tune", torch.bfloat16)
    assert rough_moments.allowed_error(less_tall, ACE, decision) == 0.0
    large = task_vectors((320, 160), 0.02, "of a fine-tune", torch.bfloat16)
    assert SHARE_OF_ROUNDING * large.output_rounding < 0.035 * math.sqrt(max(large.energies))
    assert rough_moments.allowed_error(large, ACE, decision) == 0.0
    in_bfloat16(monkeypatch, smallest=161)
    assert rough_moments.allowed_error(vectors, ACE, decision) == 0.0


@pytest.mark.parametrize(("m", "rough"), [(200, False), (320, True)])
def test_moments_and_products_share_the_error_that_is_allowed(
    m: int, rough: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of its square each, where both are rounded."""
    in_bfloat16(monkeypatch)
    vectors = task_vectors((m, 160), 0.0003, "of a fine-tune", torch.bfloat16)
    equations: Any = matrix_weights.assemble_matrix_weights(vectors, ACE, decide(vectors, ACE))
    allowed = matrix_weights.allowed_error(vectors, ACE)
    assert allowed > 0
    assert equations.error == pytest.approx(allowed * (0.5**0.5 if rough else 1.0))
    assert equations.of_moments == pytest.approx(allowed * 0.5**0.5 if rough else 0.0)
    assert equations.keep_response is True
    full: Any = matrix_weights.assemble_matrix_weights(vectors, ACE, decide(vectors, ACE), rough=False)
    assert (full.of_moments, full.error) == (0.0, pytest.approx(allowed))


@pytest.mark.parametrize("weights", [(1.0, 3.0, 2.0), (3.0, 1.0, 2.0), (1.0, 1.0, 1.0)])
def test_the_matrix_weights_are_of_what_differs_from_the_expert_that_weighs_most(
    weights: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of equal weights from the longest update."""
    used = []
    original = matrix_weights._Differences

    def differences(vectors: TaskVectors, t: int, reference: int) -> object:
        used.append((t, reference))
        return original(vectors, t, reference)

    monkeypatch.setattr(matrix_weights, "_Differences", differences)
    monkeypatch.setattr(merge, "assemble", matrix_weights.assemble_matrix_weights)
    plain = layer(steep_updates(60, 20, 3, spread=0.5))
    experts = [replace(expert, weight=weight) for expert, weight in zip(plain.experts, weights, strict=True)]
    merge_by_covariance(StoredTaskVectors(plain.base, experts), with_epsilon(SOLVED, 1e-6))
    heaviest = weights.index(max(weights))
    others = [t for t in range(3) if t != heaviest]
    assert used == [(t, heaviest) for t in others]


@pytest.mark.parametrize("size", [1e-4, 1e4])
def test_a_product_with_weights_is_added_where_its_error_is_within_what_is_allowed(size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = layer([size * update for update in steep_updates(40, 30, 2)], dtype=torch.float32, base_scale=0.0)
    tensors = [expert.tensor for expert in vectors.experts]
    apart = matrix_weights._Differences(vectors, 0, 1)
    weights = 0.5 * torch.eye(30) + 0.05 * torch.randn(30, 30, generator=generator)
    target = torch.zeros(40, 30)
    estimate = matrix_weights._add_rough_product_(target, apart, weights, size)
    assert estimate is not None
    exact = (tensors[0] - tensors[1]).double() @ weights.double()
    assert float((target.double() - exact).norm()) == pytest.approx(estimate, rel=0.15)
    target = torch.zeros(40, 30)
    assert matrix_weights._add_rough_product_(target, apart, weights, 0.3 * estimate) is None
    assert torch.equal(target, torch.zeros(40, 30))
    # Of a multiple of the identity nothing is left to round, nor of equal experts.
    assert matrix_weights._add_rough_product_(target, apart, 2 * torch.eye(30), size) == pytest.approx(
        0, abs=1e-6 * size
    )
    torch.testing.assert_close(target, 2 * (tensors[0] - tensors[1]))
    same = matrix_weights._Differences(vectors, 0, 0)
    assert matrix_weights._add_rough_product_(target, same, weights, size) == 0.0


def test_a_rounding_below_half_of_the_ridge_leaves_the_system_definite() -> None:
    moments = [RegularizedMoment(scale=2.0, ridge=r, trace=5.0, squared_norm=9.0) for r in (1.0, 3.0)]
    # The roundings add up by their squares; the largest eigenvalue is 2 / sqrt(n) of the norm.
    rounding = 1.66e-3 * math.sqrt((0.5 * 2) ** 2 * 9 + (1.5 * 2) ** 2 * 9)
    assert rough_moments._rounding(moments, [0.5, 1.5]) == pytest.approx(rounding)
    for times, below in ((1.01, True), (0.99, False)):
        # 2 / sqrt(4) of the rounding, and half of (0.5 + 1.5) ridges
        scaled = [replace(moment, ridge=times * rounding) for moment in moments]
        assert rough_moments.is_below_the_ridge(scaled, [0.5, 1.5], 4) is below


def test_the_error_of_rounded_moments_is_estimated_by_the_inverse() -> None:
    """`u sqrt(sum (a scale)^2 ||G||^2 2 max_t e_t) ||A^-1||_F / n`, the norm by random vectors."""
    vectors = layer(steep_updates(60, 40, 2, spread=2.0))
    moments = [RegularizedMoment(scale=2.0, ridge=1.0, trace=5.0, squared_norm=9.0)] * 2
    # Of another seed than the random vectors.
    matrix = spd(40, condition=10.0, seed=3)
    found = rough_moments.estimated_error(vectors, moments, torch.linalg.cholesky(matrix))
    inverse = float(torch.linalg.inv(matrix).norm())
    expected = 1.66e-3 * math.sqrt(2 * 4 * 9 * 2 * max(vectors.energies)) * inverse / 40
    assert found == pytest.approx(expected, rel=0.2)


ROUTES = {
    "dense": (dense, dense.assemble_dense, lambda: steep_updates(30, 40, 3)),
    "from a reference": (from_reference, from_reference.assemble_from_reference, lambda: steep_updates(40, 30, 3)),
    "matrix weights": (matrix_weights, matrix_weights.assemble_matrix_weights, lambda: steep_updates(60, 20, 2)),
    "few rows": (stacked_rows, None, lambda: steep_updates(8, 64, 3)),
}


@pytest.mark.parametrize("route", ROUTES)
def test_each_route_names_the_tensor_whose_system_it_factorizes(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, assemble, updates = ROUTES[route]
    named, conditions = [], []
    original = module.cholesky_factor

    def factor(matrix: Tensor, *, what: str) -> Tensor:
        named.append(what)
        conditions.append(float(torch.linalg.cond(matrix)))
        return original(matrix, what=what)

    monkeypatch.setattr(module, "cholesky_factor", factor)
    if assemble is not None:
        monkeypatch.setattr(merge, "assemble", assemble)
    options = with_epsilon(SOLVED, 1e-2)
    assert merge_by_covariance(layer(updates()), options).condition is None
    assert named == ["layers.0.up_proj.weight"]
    with diagnostics():
        condition = merge_by_covariance(layer(updates()), options).condition
    assert condition is not None
    if route == "few rows":
        # The ridge alone is in the directions that the rows leave.
        assert condition >= conditions[1]
    else:
        assert condition == pytest.approx(conditions[1], rel=0.02)
