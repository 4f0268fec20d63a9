"""Estimates: what each method is counted at, and how a machine's speed is measured."""

import pytest

from mergekit_ace.checks.cost import per_cube
from mergekit_ace.methods.catalogue import METHODS
from mergekit_ace.recipe.arithmetic import Arithmetic, arithmetic_of

BY_NAME = {method.name: method for method in METHODS}
M, N, T = 48, 64, 3


def counted(name: str, m: int = M, n: int = N, **given: object) -> Arithmetic:
    method = BY_NAME[name]
    defaults = {parameter.name: parameter.default for parameter in method.parameters}
    return arithmetic_of(method, {**defaults, **given}, m, n, T)


def test_eigendecompositions_by_method() -> None:
    """As many as the method makes of each size, and none for a solve."""
    assert counted("iso_c").cubes == M**3
    # One an expert, and the polar factors of `[m, T k]` and `[n, T k]`, `T k = m`.
    assert counted("tsv_m").cubes == (T + 2) * M**3
    assert counted("cart").cubes == T * M**3
    assert counted("cart", rank_fraction=0.0) == Arithmetic()
    assert counted("wudi").cubes == counted("actmat").cubes == 0
    assert counted("ace").cubes == M**3
    assert counted("ace", spectral_fraction=0.0).cubes == 0


def test_the_refinement_is_counted_in_float64() -> None:
    """Its Gram matrix, half of it, and the vectors of the other side."""
    k = int(0.5 * M)
    refined, plain = counted("ace", spectral_fraction=0.5), counted("ace", spectral_fraction=0.0)
    assert refined.double - plain.double == M * M * N / 2 + k * M * N
    assert refined.single - plain.single == M * N * k
    assert plain.double == 0


def test_the_refinement_of_a_tall_matrix_is_that_of_its_transpose() -> None:
    tall, wide = (counted("ace", m, n) for m, n in ((N, M), (M, N)))
    assert (tall.double, tall.cubes) == (wide.double, wide.cubes)


def test_adam_takes_a_product_a_step() -> None:
    few, many = (counted("wudi", solver="adam", steps=steps).single for steps in (100, 300))
    assert many - few == 200 * M * N * N


@pytest.mark.parametrize("name", BY_NAME)
def test_larger_matrices_take_more(name: str) -> None:
    small, large = counted(name), counted(name, 2 * M, 2 * N)
    assert large.single > 6 * small.single
    assert large.double >= 6 * small.double


def test_a_probe_is_large_enough_not_to_measure_the_start_of_the_work() -> None:
    """A device that takes 0.1 ms to start and 1e-12 s a multiply-add is measured at the latter within 10 percent."""
    sizes = []

    def seconds(size: int) -> float:
        sizes.append(size)
        return 1e-4 + 1e-12 * size**3

    assert per_cube(seconds) == pytest.approx(1e-12, rel=0.1)
    assert sizes == [512, 1024, 2048, 4096]


def test_a_slow_machine_is_measured_by_a_small_probe() -> None:
    sizes = []

    def seconds(size: int) -> float:
        sizes.append(size)
        return 1e-9 * size**3

    assert per_cube(seconds) == pytest.approx(1e-9)
    assert sizes == [512]
