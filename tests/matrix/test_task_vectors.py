"""Task vectors of one matrix: their sizes, units, copies and pieces, by numbers that follow by hand."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mergekit_ace.matrix.expert import Expert, MeasuredMoment, difference
from mergekit_ace.matrix.stored_task_vectors import StoredTaskVectors
from mergekit_ace.matrix.task_vectors import TaskVectors, UpdateStatistics
from tests.matrix.experts import layer, steep_updates

BASE = torch.full((2, 3), 2.0)
ONE = torch.tensor([[1.0, 0.0, 2.0], [3.0, 0.0, 0.0]])
TWO = torch.tensor([[0.0, 4.0, 0.0], [0.0, 4.0, 0.0]])


def vectors(
    *updates: Tensor, weights: tuple[float, ...] = (1.0, 3.0), dtype: torch.dtype = torch.float32
) -> TaskVectors:
    experts = [
        Expert(name=str(t), tensor=(BASE + update).to(dtype), weight=weights[t]) for t, update in enumerate(updates)
    ]
    return StoredTaskVectors(BASE.to(dtype), experts)


def test_sizes() -> None:
    found = vectors(ONE, TWO)
    assert found.shares == (0.5, 1.5)
    assert found.energies == (14.0, 32.0)
    # mean rows (2, 0, 1) and (0, 4, 0), twice each
    assert found.statistics[0] == UpdateStatistics(energy=14.0, centered_energy=14.0 - 2 * 5.0)
    assert found.statistics[1] == UpdateStatistics(energy=32.0, centered_energy=0.0)
    mean = (0.5 * ONE + 1.5 * TWO) / 2
    torch.testing.assert_close(found.mean(), mean)
    torch.testing.assert_close(found.sum(), 2 * mean)
    assert found.energy_of_mean == pytest.approx(float(mean.square().sum()))
    assert found.base_norm == pytest.approx(math.sqrt(24))
    assert found.rounding == pytest.approx(2.0**-23 / 2 * 2.0 * (math.sqrt(2) + math.sqrt(3)))
    assert (found.shape, found.buffer_shape, found.measured, found.unit, len(found)) == ((2, 3), (2, 3), 0, 1.0, 2)
    assert found.name == "the matrix"
    # What is left out has no part in the mean.
    padded = vectors(ONE, TWO, torch.zeros(2, 3), ONE, weights=(1.0, 3.0, 5.0, 0.0))
    assert (padded.shares, padded.energy_of_mean) == (found.shares, pytest.approx(found.energy_of_mean))
    assert padded.left_out == {"3": "weight 0", "2": "equal to the base here"}
    none = vectors(torch.zeros(2, 3))
    assert (len(none), none.shares, none.energy_of_mean, none.suitable_unit) == (0, (), 0.0, 1.0)


@pytest.mark.parametrize(
    ("dtype", "step"), [(torch.bfloat16, 2.0**-6), (torch.float16, 2.0**-9), (torch.float32, 0), (torch.float64, 0)]
)
def test_rounding_of_the_output(dtype: torch.dtype, step: float) -> None:
    """Of weights between 2 and 4, whose neighbors are a step apart; coarser formats alone count."""
    found = vectors(ONE, TWO, dtype=dtype)
    assert found.output_rounding == pytest.approx(math.sqrt(6 * step**2 / 12))
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.task_vector(0).dtype == found.dtype
    assert found.rounding == pytest.approx(torch.finfo(found.dtype).eps * (math.sqrt(2) + math.sqrt(3)))


@pytest.mark.parametrize(
    ("size", "power"),
    [(1.0, 0), (1.1e-6, 0), (0.9e-6, -20), (0.9e6, 0), (1.1e6, 20), (2.0**-50, -50), (2.0**31, 31), (1e-25, -83)],
)
def test_units(size: float, power: int) -> None:
    """A power of two near the longest update, where its energy is below 1e-12 or above 1e12."""
    update = torch.zeros(2, 3, dtype=torch.float64)
    update[0, 1] = size
    base = torch.zeros(2, 3, dtype=torch.float64)
    found = StoredTaskVectors(base, [Expert(name="a", tensor=update), Expert(name="b", tensor=update * 1e-3)])
    assert found.suitable_unit == 2.0**power


def test_task_vectors_in_other_units() -> None:
    found = vectors(ONE, TWO, dtype=torch.bfloat16)
    scaled = found.in_units_of(4.0)
    assert scaled.unit == 4.0
    assert scaled.in_units_of(0.5).unit == 2.0
    assert scaled.base.dtype == torch.float32
    assert torch.equal(scaled.base, BASE / 4)
    for t, update in enumerate((ONE, TWO)):
        assert torch.equal(scaled.task_vector(t), update / 4)
        assert scaled.experts[t].tensor.dtype == torch.float32
        assert scaled.experts[t].weight == found.experts[t].weight
    assert scaled.statistics == (
        UpdateStatistics(energy=14.0 / 16, centered_energy=4.0 / 16),
        UpdateStatistics(energy=32.0 / 16, centered_energy=0.0),
    )
    assert scaled.base_norm == pytest.approx(math.sqrt(24) / 4)
    assert scaled.energy_of_mean == pytest.approx(found.energy_of_mean / 16)
    assert scaled.shares == found.shares
    # The one that it was made of is as it was.
    assert (found.unit, found.energies, found.base_norm) == (1.0, (14.0, 32.0), pytest.approx(math.sqrt(24)))
    found.base_norm = None
    assert found.in_units_of(4.0).base_norm is None


def test_copies_count_as_one_of_their_summed_weight() -> None:
    found = vectors(ONE, TWO, ONE, 2 * ONE, TWO, weights=(1.0, 2.0, 3.0, 4.0, 2.0))
    # shares 5/12 of each
    distinct, became = found.without_copies()
    assert became == (0, 1, 0, 2, 1)
    assert [expert.name for expert in distinct.experts] == ["0", "1", "3"]
    assert distinct.shares == pytest.approx((1.0, 1.0, 1.0))
    assert distinct.energies == (14.0, 32.0, 56.0)
    assert len(distinct.rounding_energies()) == 3
    assert len(found) == 5
    other = vectors(ONE, TWO, ONE, weights=(1.0, 2.0, 3.0)).without_copies()[0]
    assert other.shares == pytest.approx((4 / 3, 2 / 3))
    # Of one energy, and yet no copy.
    assert vectors(ONE, -ONE).without_copies()[1] == (0, 1)
    # Copies with second moments of their own are two experts.
    measured = MeasuredMoment(factor=torch.eye(3), error=0.0, tokens=3)
    experts = [replace(expert, measured=measured) for expert in vectors(ONE, ONE).experts]
    assert StoredTaskVectors(BASE, experts).without_copies()[1] == (0, 0)
    assert StoredTaskVectors(BASE, experts).measured == 2
    assert StoredTaskVectors(BASE, [experts[0], replace(experts[1], measured=None)]).without_copies()[1] == (0, 1)


def test_other_shares() -> None:
    found = vectors(ONE, TWO)
    turned = found.with_shares([1.5, 0.5])
    assert (turned.shares, found.shares) == ((1.5, 0.5), (0.5, 1.5))
    torch.testing.assert_close(turned.sum(), 1.5 * ONE + 0.5 * TWO)


def test_pieces_and_products() -> None:
    found = layer(steep_updates(20, 12, 2))
    update = found.task_vector(1)
    torch.testing.assert_close(found.gram(1), update.T @ update)
    rough = layer(steep_updates(20, 12, 2), dtype=torch.float32)
    exact = rough.task_vector(1).double().T @ rough.task_vector(1).double()
    error = float((rough.gram(1, rough=True).double() - exact).norm() / exact.norm())
    assert 1e-4 < error < 1e-2
    assert float((rough.gram(1).double() - exact).norm() / exact.norm()) < 1e-6
    assert torch.equal(found.rows(1, slice(3, 7)), update[3:7])
    assert torch.equal(found.sample(1, row_step=3, column_step=5), update[::3, ::5])
    buffer = torch.empty(20, 12, dtype=torch.float64)
    assert found.task_vector(1, out=buffer) is buffer
    assert torch.equal(buffer, update)
    assert found.zeros(2, 5).dtype == torch.float64
    torch.testing.assert_close(found.mean_row(update), update.mean(dim=0))
    row = torch.arange(12, dtype=torch.float64)
    torch.testing.assert_close(found.add_to_every_row_(update.clone(), row), update + row)
    torch.testing.assert_close(found.add_to_every_row_(update.clone(), row, factor=-2.0), update - 2 * row)
    target = torch.ones(20, 12, dtype=torch.float64)
    torch.testing.assert_close(found.add_mean_(target, factor=0.5), 1 + 0.5 * found.mean())


def test_differences_are_copies_in_the_asked_dtype() -> None:
    tensor, base = torch.ones(2, 3).T, torch.full((3, 2), 0.5)
    found = difference(tensor, base, torch.float64)
    assert found.dtype == torch.float64
    assert found.is_contiguous()
    assert torch.equal(found, torch.full((3, 2), 0.5, dtype=torch.float64))
    same = difference(base, torch.zeros(3, 2), torch.float32)
    assert same.data_ptr() != base.data_ptr()
    assert torch.equal(base, torch.full((3, 2), 0.5))
