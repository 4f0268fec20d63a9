"""Every method of the catalogue gives on cores what it gives on the matrices themselves."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mergekit_ace.factors.core_space import core_space, output_space, task_vectors_of
from mergekit_ace.linalg.factors import Factors
from mergekit_ace.matrix.expert import Expert, Participant
from mergekit_ace.matrix.stored_task_vectors import StoredTaskVectors
from mergekit_ace.matrix.task_vectors import TaskVectors
from mergekit_ace.mergekit_internals import resolve_parameters
from mergekit_ace.methods import METHODS

# Relative to the length of the result, in float64 and in float32.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-4}
# Wide, tall, square; ranks that together are below, and above, one side.
SHAPES = {"wide": (24, 60), "tall": (60, 24), "square": (40, 40), "more rank than rows": (10, 48)}
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "ace": [
        {},
        {"correlation_threshold": 0},
        {"preset": "published"},
        {"preset": "published", "heterogeneity_threshold": 0},
        {"preset": "published", "epsilon": "auto", "structural_prior": False},
        {"structural_prior": True, "correlation_threshold": 0, "epsilon": 0.1},
    ],
    "iso_c": [{}, {"mean_over": "all"}],
    "iso_cts": [{}, {"common_fraction": 0.1}, {"mean_over": "all"}],
    "wudi": [{}, {"solver": "flow"}, {"solver": "flow", "start": "average", "flow_time": 10.0}],
    "cart": [{}, {"rank_fraction": 0.2, "lambda": 2.0}],
}
CASES = [
    pytest.param(method, settings, id=f"{method.name} {settings}")
    for method in METHODS
    for settings in SETTINGS.get(method.name, [{}])
]


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def updates_of(shape: tuple[int, int], dtype: torch.dtype) -> list[Factors]:
    """Adapters of ranks 3, 2 and 4 whose inputs have directions in common, with mean rows that are not zero."""
    m, n = shape
    shared = drawn(2, n, seed=9)
    return [
        Factors(
            left=((drawn(m, rank, seed=t) + 0.3) * (1 + t) * 0.03).to(dtype),
            right=(drawn(rank, n, seed=t + 20) + 2 * drawn(rank, 2, seed=t + 40) @ shared).to(dtype),
        )
        for t, rank in enumerate((3, 2, 4))
    ]


def merged(method: Any, task_vectors: TaskVectors, settings: dict[str, Any]) -> Tensor:
    parameters, _ = resolve_parameters(method.spec, tensor_name="w", inputs={}, sources=lambda _: [settings])
    return method.merge_matrix(task_vectors, parameters).task_vector


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("method", "settings"), CASES)
def test_cores_give_what_matrices_give(
    method: Any, settings: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weights = [1.0, 0.5, 2.0]
    # In float64: float32 matrices with a small fixed ridge are less exact than the cores.
    whole = [
        Expert(name=str(t), tensor=update.left @ update.right, weight=weight)
        for t, (update, weight) in enumerate(zip(updates_of(shape, torch.float64), weights, strict=True))
    ]
    # A few times as large as the updates, so that a merge that depends on its size tells.
    base = drawn(*shape, seed=60)
    whole = [replace(expert, tensor=base + expert.tensor) for expert in whole]
    expected = merged(method, StoredTaskVectors(base, whole, name="w"), settings)
    space = core_space(updates_of(shape, dtype))
    small = merged(method, task_vectors_of(space, whole, name="w", base_norm=float(base.norm())), settings)
    actual = (space.left @ small @ space.right).double()
    assert expected.norm() > 0.01
    assert (actual - expected).norm() <= _TOLERANCE[dtype] * expected.norm()


def test_the_cores_are_the_updates_in_orthonormal_coordinates() -> None:
    updates = updates_of((24, 60), torch.float64)
    space = core_space(updates)
    assert space.left.shape == (24, 10)  # the ranks, and the column of ones
    assert space.right.shape == (9, 60)
    torch.testing.assert_close(space.left.mT @ space.left, torch.eye(10, dtype=torch.float64))
    torch.testing.assert_close(space.right @ space.right.mT, torch.eye(9, dtype=torch.float64))
    for update, core in zip(updates, space.cores, strict=True):
        torch.testing.assert_close(space.left @ core.matrix() @ space.right, update.left @ update.right)
    ones = torch.ones(24, dtype=torch.float64)
    torch.testing.assert_close(space.left @ space.left.mT @ ones, ones)


def test_factors_are_balanced_and_of_the_numerical_rank() -> None:
    updates = updates_of((24, 60), torch.float32)
    space = core_space([updates[0], updates[0], updates[1]])
    core = sum(core.matrix() for core in space.cores)
    factors = space.factors(core)
    assert factors.rank == 5
    expected = 2 * updates[0].left @ updates[0].right + updates[1].left @ updates[1].right
    torch.testing.assert_close(factors.left @ factors.right, expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(factors.left.norm(dim=0), factors.right.norm(dim=1))


def test_equal_updates_have_equal_cores() -> None:
    """A factorization gives equal columns unequal rounding, and copies would not count as one expert."""
    one, two, _ = updates_of((24, 60), torch.float32)
    copy = Factors(left=one.left.clone(), right=one.right.clone())
    for space in (core_space([one, two, copy]), output_space([one, two, copy])):
        assert space.left.shape == (24, 3 + 2 + 1)
        experts = [
            Participant(name=name, weight=weight) for name, weight in (("one", 1.0), ("two", 2.0), ("copy", 3.0))
        ]
        distinct, became = task_vectors_of(space, experts, name="w").without_copies()
        assert became == (0, 1, 0)
        assert [expert.name for expert in distinct.experts] == ["one", "two"]
        assert distinct.shares == pytest.approx([4 / 3, 2 / 3])
