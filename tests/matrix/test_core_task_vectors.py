"""Task vectors that are held as factors, in coordinates that they share."""

import math

import pytest
import torch
from torch import Tensor

from mergekit_ace.linalg.factors import Factors
from mergekit_ace.matrix.coordinates import Coordinates
from mergekit_ace.matrix.core_task_vectors import CoreExpert, CoreTaskVectors

SHAPE = (12, 9)
P, Q, RANK = 6, 5, 2


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bases() -> tuple[Tensor, Tensor]:
    """`U` and `V`; `U` spans the column of ones."""
    left = torch.linalg.qr(torch.cat([torch.ones(SHAPE[0], 1), drawn(SHAPE[0], P - 1, seed=1)], dim=1).double()).Q
    return left, torch.linalg.qr(drawn(SHAPE[1], Q, seed=2)).Q.mT


def cores(dtype: torch.dtype = torch.float64, count: int = 3) -> list[Factors]:
    return [
        Factors(left=drawn(P, RANK, seed=t).to(dtype), right=drawn(RANK, Q, seed=10 + t).to(dtype))
        for t in range(count)
    ]


def found_of(factors: list[Factors], weights: tuple[float, ...] = (1.0, 2.0, 0.5)) -> CoreTaskVectors:
    left, right = bases()
    coordinates = Coordinates(shape=SHAPE, ones_left=left.sum(dim=0), ones_right=right.sum(dim=1))
    experts = [CoreExpert(name=str(t), core=core, weight=weights[t]) for t, core in enumerate(factors)]
    return CoreTaskVectors(experts, coordinates=coordinates, name="layer", base_norm=5.0, depth=4)


def test_they_stand_for_larger_matrices() -> None:
    left, right = bases()
    found, wholes = found_of(cores()), [left @ core.matrix() @ right for core in cores()]
    assert (found.shape, found.buffer_shape) == (SHAPE, (P, Q))
    assert (found.base_norm, found.depth) == (5.0, 4)
    assert found.energies == pytest.approx([float(whole.square().sum()) for whole in wholes])
    centered = [whole - whole.mean(dim=0) for whole in wholes]
    assert [s.centered_energy for s in found.statistics] == pytest.approx([float(c.square().sum()) for c in centered])
    mean = sum(share * whole for share, whole in zip(found.shares, wholes, strict=True)) / 3
    assert found.energy_of_mean == pytest.approx(float(mean.square().sum()))
    core = found.task_vector(0)
    torch.testing.assert_close(found.mean_row(core) @ right, wholes[0].mean(dim=0))
    row = drawn(Q, seed=30)
    added = left @ found.add_to_every_row_(core.clone(), row, factor=0.5) @ right
    torch.testing.assert_close(added, wholes[0] + 0.5 * row @ right)


def test_every_way_to_them_gives_the_same() -> None:
    found, wholes = found_of(cores()), [core.matrix() for core in cores()]
    rows = slice(1, 4)
    for t, whole in enumerate(wholes):
        torch.testing.assert_close(found.task_vector(t), whole)
        torch.testing.assert_close(found.rows(t, rows), whole[rows])
        torch.testing.assert_close(found.apart(t, 1, rows), whole[rows] - wholes[1][rows])
        torch.testing.assert_close(found.gram(t), whole.mT @ whole)
        torch.testing.assert_close(found.gram(t, rough=True), whole.mT @ whole, rtol=0, atol=0.02 * found.energies[t])
        matrix = drawn(Q, Q, seed=31)
        product = found.add_apart_times_(torch.ones(P, Q, dtype=torch.float64), t, 1, matrix)
        torch.testing.assert_close(product, 1 + (whole - wholes[1]) @ matrix)
        out = torch.empty_like(whole)
        assert found.task_vector(t, out=out) is out
        torch.testing.assert_close(out, whole)
    torch.testing.assert_close(found.sum(), sum(a * whole for a, whole in zip(found.shares, wholes, strict=True)))
    halved = found.in_units_of(0.5)
    torch.testing.assert_close(halved.task_vector(1), 2 * wholes[1])
    torch.testing.assert_close(found.task_vector(1), wholes[1])
    assert halved.energies == pytest.approx([4 * energy for energy in found.energies])


@pytest.mark.parametrize("rank", [1, RANK, 8])
def test_singular_triples_are_those_of_the_product(rank: int) -> None:
    """By the factors alone, of fewer and of more columns than a side."""
    core = Factors(left=drawn(P, rank, seed=3), right=drawn(rank, Q, seed=4))
    found, whole = found_of([core], (1.0,)), core.matrix()
    expected = torch.linalg.svdvals(whole)
    for k in (1, 2, Q):
        triples = found.singular_triples(0, k)
        kept = min(k, rank, Q)
        assert triples.on_host == pytest.approx(expected[:kept].tolist())
        torch.testing.assert_close(triples.left.mT @ triples.left, torch.eye(kept, dtype=torch.float64))
        product = triples.left * triples.singular_values @ triples.right.mT
        U, s, Vh = torch.linalg.svd(whole)
        torch.testing.assert_close(product, U[:, :kept] * s[:kept] @ Vh[:kept])
        assert found.top_energies([0], k) == pytest.approx([float(expected[:kept].square().sum())])


def test_nothing_in_factors_is_the_rounding_of_weights() -> None:
    found = found_of(cores(torch.float32))
    assert (found.rounding, found.output_rounding, found.rounding_energies()) == (0.0, 0.0, [0.0] * 3)
    assert found.dtype == torch.float32


def test_who_has_no_part() -> None:
    one, two, three = cores()
    nothing = Factors(left=torch.zeros_like(two.left), right=two.right)
    found = found_of([one, nothing, three], (1.0, 1.0, 0.0))
    assert found.left_out == {"1": "equal to the base here", "2": "weight 0"}
    assert [expert.name for expert in found.experts] == ["0"]
    assert len(found_of([nothing], (1.0,))) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e25])
def test_what_is_not_finite_is_named(value: float) -> None:
    one, two, three = cores(torch.float32)
    two.left[0, 0] = value
    two.right[0, 0] = 1e25
    with pytest.raises(ValueError, match="layer: every weight must be finite; the update of expert 1 holds NaN or inf"):
        found_of([one, two, three])
