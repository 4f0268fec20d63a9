"""Updates and ridges at the ends of float32's range: the merge of ordinary ones, in other units."""

import pytest
import torch
from torch import Tensor

from mergekit_ace.matrix.expert import Expert
from mergekit_ace.matrix.stored_task_vectors import StoredTaskVectors
from tests.family.cases import Case, cases, drawn

# What depends on the unit of the weights by its definition: a fixed ridge, the published gate, a learning rate.
SCALE_FREE = [case for case in cases() if "preset=published" not in str(case) and "solver=adam" not in str(case)]
SHAPE = (40, 30)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("case", SCALE_FREE, ids=str)
@pytest.mark.parametrize("exponent", [-100, -50, 60, 80])
def test_updates_of_any_size_are_merged_alike(case: Case, exponent: int) -> None:
    """Over a base of zeros: any other base has more rounding than the small ones."""
    _, experts = drawn(3, *SHAPE, dtype=torch.float32)
    base = torch.zeros(SHAPE)
    expected = case.merge(base, experts)
    scaled = case.merge(base, [torch.ldexp(expert, torch.tensor(exponent)) for expert in experts])
    assert relative(torch.ldexp(scaled.double(), torch.tensor(-exponent)), expected) < 1e-5


@pytest.mark.parametrize("name", ["ace", "actmat", "wudi", "ace-preset=published"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_ridge_beyond_the_range_is_the_limit_of_large_ones(name: str, dtype: torch.dtype) -> None:
    case = next(case for case in cases() if str(case) == name)
    base, experts = drawn(3, *SHAPE, dtype=dtype)
    limit = case.merge(base, experts, epsilon=1e20)
    for epsilon in (1e38, 1e300):
        assert relative(case.merge(base, experts, epsilon=epsilon) - base, limit - base) < 1e-5


def test_a_residual_beyond_the_range_names_the_tensor_and_the_ridge() -> None:
    case = next(case for case in cases() if str(case) == "ace-preset=published")
    base, experts = drawn(3, *SHAPE, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"layers\.0\.weight: epsilon must .*float32 can hold; 1e\+300 makes"):
        case.merge(base, experts, epsilon=1e300, heterogeneity_threshold=0.0)


def test_units_are_powers_of_two_and_ordinary_updates_have_none() -> None:
    base, experts = drawn(3, *SHAPE, dtype=torch.float32)
    for exponent in (-60, 0, 60):
        factor = 2.0**exponent
        task_vectors = StoredTaskVectors(
            base * factor, [Expert(name=str(t), tensor=expert * factor) for t, expert in enumerate(experts)]
        )
        unit = task_vectors.suitable_unit
        if exponent == 0:
            assert unit == 1
        scaled = task_vectors.in_units_of(unit)
        assert 0.5 <= max(scaled.energies) <= 2 or exponent == 0
        assert torch.equal(scaled.task_vector(1) * unit, task_vectors.task_vector(1))
        assert scaled.base_norm == pytest.approx(float(scaled.base.norm()), rel=1e-6)
