"""The merge as a mean of matrix weights, and from a reference: the solution by the numerator; and in bfloat16."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mergekit_ace.linalg import bfloat16, blocks
from mergekit_ace.matrix import from_reference, matrix_weights, merge
from mergekit_ace.matrix.budget import SHARE_OF_ROUNDING
from mergekit_ace.matrix.dense import assemble_dense
from mergekit_ace.matrix.expert import Expert
from mergekit_ace.matrix.from_reference import assemble_from_reference
from mergekit_ace.matrix.matrix_weights import assemble_matrix_weights
from mergekit_ace.matrix.merge import MatrixMerge, merge_by_covariance
from mergekit_ace.matrix.options import Bounds, CovarianceOptions, SecondMoment
from mergekit_ace.matrix.presets import ACE, ACE_PUBLISHED, ACTMAT, WUDI, with_epsilon
from mergekit_ace.matrix.stored_task_vectors import StoredTaskVectors
from mergekit_ace.matrix.task_vectors import TaskVectors
from mergekit_ace.matrix.workload import by_matrix_weights
from tests.matrix.experts import layer, related_updates, steep_updates
from tests.matrix.test_budget import SPECTRA, error_and_rounding, task_vectors

LAYERS: dict[str, Callable[[], list[Tensor]]] = {
    "square": lambda: steep_updates(60, 60, 3, spread=2.0),
    "tall": lambda: related_updates(120, 40, 5, spread=1.5),
    "a copy": lambda: [*steep_updates(60, 50, 2), steep_updates(60, 50, 1)[0]],
}
# Spectra as steep as those of adapters, and no merge without second moments for it.
WITH_MOMENTS = replace(ACE, correlation_threshold=0.0, bounds=Bounds(retention=True))
OPTIONS = [
    ACE,
    WITH_MOMENTS,
    replace(WITH_MOMENTS, refinement=None),
    with_epsilon(WITH_MOMENTS, 1e-3),
    ACTMAT,
    WUDI,
    CovarianceOptions(second_moment=SecondMoment(), bounds=Bounds(retention=True)),
]


ROUTES = {"matrix weights": assemble_matrix_weights, "from a reference": assemble_from_reference}


def both(
    task_vectors: TaskVectors, options: CovarianceOptions, route: str, monkeypatch: pytest.MonkeyPatch
) -> list[MatrixMerge]:
    """By a route, and by the numerator."""
    found = []
    for assemble in (ROUTES[route], assemble_dense):
        monkeypatch.setattr(merge, "assemble", assemble)
        found.append(merge_by_covariance(task_vectors, options))
    return found


@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("route", ROUTES)
def test_all_routes_give_one_merge(
    route: str, kind: str, options: CovarianceOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = layer(LAYERS[kind]())
    ours, dense = both(vectors, options, route, monkeypatch)
    torch.testing.assert_close(ours.task_vector, dense.task_vector, rtol=0, atol=1e-9 * float(dense.task_vector.norm()))
    assert ours.correlation == pytest.approx(dense.correlation)
    assert ours.moments or options is ACE
    if options.bounds.retention and ours.moments:
        assert ours.retention == pytest.approx(dense.retention, rel=1e-8)
    assert ours.scale_factor == pytest.approx(dense.scale_factor, rel=1e-8)


@pytest.mark.parametrize("route", ROUTES)
def test_rows_in_pieces_give_the_same_merge(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = layer(LAYERS["tall"]())
    monkeypatch.setattr(merge, "assemble", ROUTES[route])
    whole = merge_by_covariance(vectors, WITH_MOMENTS).task_vector
    monkeypatch.setattr(blocks, "_PANEL", 1)
    monkeypatch.setattr(blocks, "_FEWEST_ROWS", 50)
    assert [rows.stop for rows in vectors.row_panels()] == [50, 100, 120]
    pieces = merge_by_covariance(vectors, WITH_MOMENTS).task_vector
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-9 * float(whole.norm()))


@pytest.mark.parametrize("kind", ["square", "tall"])
@pytest.mark.parametrize("route", ROUTES)
def test_float32_loses_no_more_than_by_the_numerator(route: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = layer(LAYERS[kind](), dtype=torch.float32)
    exact = layer([expert.tensor.double() - vectors.base.double() for expert in vectors.experts], base_scale=0.0)
    options = replace(ACE, refinement=None, bounds=Bounds(), correlation_threshold=0.0)
    solution = merge_by_covariance(exact, options).task_vector
    ours, dense = (float((m.task_vector - solution).norm()) for m in both(vectors, options, route, monkeypatch))
    assert ours < dense if route == "matrix weights" else ours < 1.1 * dense


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("route", ROUTES)
def test_the_order_of_experts_does_not_matter(route: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "assemble", ROUTES[route])
    updates = LAYERS[kind]()
    merged = merge_by_covariance(layer(updates), ACE).task_vector
    turned = merge_by_covariance(layer(updates[::-1]), ACE).task_vector
    torch.testing.assert_close(turned, merged, rtol=0, atol=1e-9 * float(merged.abs().max()))


def test_it_is_for_few_experts_of_tall_matrices() -> None:
    assert [by_matrix_weights(64, 64, experts) for experts in (2, 3)] == [True, False]
    assert [by_matrix_weights(128, 64, experts) for experts in (3, 4)] == [True, False]
    assert [by_matrix_weights(256, 64, experts) for experts in (5, 6)] == [True, False]
    assert [by_matrix_weights(128, 64, experts, halved=True) for experts in (4, 20)] == [True, False]
    assert not by_matrix_weights(64, 64, 3, halved=True)
    assert not by_matrix_weights(64, 65, 2)
    vectors = layer(steep_updates(60, 60, 2))
    for options in (ACE_PUBLISHED, replace(ACE, structural_prior=True)):
        assert not matrix_weights.suits(vectors, options, merge.decide(vectors, options))
        assert not from_reference.suits(vectors, options, merge.decide(vectors, options))
    assert matrix_weights.suits(vectors, ACE, merge.decide(vectors, ACE))
    wide = layer(steep_updates(60, 61, 3))
    assert not from_reference.suits(wide, ACE, merge.decide(wide, ACE))


def in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that multiplies bfloat16 faster: its products are the same on others."""
    monkeypatch.setattr(bfloat16, "is_faster", lambda *_: True)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("shape", "count"), [((320, 160), 3), ((320, 128), 3), ((640, 128), 4)], ids=str)
@pytest.mark.parametrize("size", [0.0003, 0.001, 0.005])
def test_products_in_bfloat16_keep_to_an_eighth_of_the_rounding(
    spectrum: str, shape: tuple[int, int], count: int, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_bfloat16(monkeypatch)
    vectors = task_vectors(shape, size, spectrum, torch.bfloat16, count=count)
    merged = merge_by_covariance(vectors, WITH_MOMENTS)
    assert merged.products == "bfloat16"
    assert "products in bfloat16" in merged.describe()
    error, rounding = error_and_rounding(vectors, merged.task_vector, WITH_MOMENTS)
    assert 1e-3 * rounding < error <= SHARE_OF_ROUNDING * rounding


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_product_of_few_rows_keeps_to_it_too(spectrum: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_bfloat16(monkeypatch)
    vectors = task_vectors((96, 320), 0.0003, spectrum, torch.bfloat16)
    merged = merge_by_covariance(vectors, WITH_MOMENTS)
    assert merged.products == "bfloat16"
    error, rounding = error_and_rounding(vectors, merged.task_vector, WITH_MOMENTS)
    assert 1e-3 * rounding < error <= SHARE_OF_ROUNDING * rounding
    unrefined = replace(WITH_MOMENTS, refinement=None)
    assert merge_by_covariance(vectors, unrefined).products == "bfloat16"
    large = task_vectors((96, 320), 0.02, spectrum, torch.bfloat16)
    assert merge_by_covariance(large, unrefined).products is None


def test_updates_that_are_large_beside_the_rounding_are_multiplied_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    in_bfloat16(monkeypatch)
    for dtype, size in ((torch.bfloat16, 0.1), (torch.float16, 0.01), (torch.float32, 0.001)):
        vectors = task_vectors((320, 160), size, "of a fine-tune", dtype)
        assert merge_by_covariance(vectors, ACE).products is None
    vectors = task_vectors((320, 160), 0.001, "of a fine-tune", torch.bfloat16)
    assert merge_by_covariance(vectors, replace(ACE, precision="full")).products is None


def test_what_refinement_makes_of_the_rounding_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    in_bfloat16(monkeypatch)
    monkeypatch.setattr(matrix_weights, "FOLLOWING", 1.0)
    vectors = task_vectors((320, 160), 0.01, "steep", torch.bfloat16)
    assert merge_by_covariance(vectors, replace(WITH_MOMENTS, refinement=None)).products == "bfloat16"
    merged = merge_by_covariance(vectors, WITH_MOMENTS)
    assert merged.products is None
    error, rounding = error_and_rounding(vectors, merged.task_vector, WITH_MOMENTS)
    assert error <= SHARE_OF_ROUNDING * rounding


def test_a_copy_keeps_its_moment_where_a_matrix_is_merged_again(monkeypatch: pytest.MonkeyPatch) -> None:
    in_bfloat16(monkeypatch)
    monkeypatch.setattr(matrix_weights, "FOLLOWING", 1.0)
    vectors = task_vectors((320, 160), 0.01, "steep", torch.bfloat16)
    first = vectors.experts[0]
    copied = StoredTaskVectors(vectors.base, [*vectors.experts, Expert(name="a copy", tensor=first.tensor)])
    # Else it would not be merged twice.
    assert merge_by_covariance(copied, replace(WITH_MOMENTS, refinement=None)).products == "bfloat16"
    merged = merge_by_covariance(copied, WITH_MOMENTS)
    assert merged.products is None
    assert len(merged.moments) == len(copied)
    assert merged.moments[-1] is merged.moments[0]


def test_equal_experts_are_exact_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    in_bfloat16(monkeypatch)
    vectors = task_vectors((320, 160), 0.001, "of a fine-tune", torch.bfloat16, count=1)
    thrice = StoredTaskVectors(vectors.base, [Expert(name=str(t), tensor=vectors.experts[0].tensor) for t in range(3)])
    merged = merge_by_covariance(thrice, replace(WITH_MOMENTS, combine_copies=False, bounds=Bounds()))
    torch.testing.assert_close(merged.task_vector, vectors.task_vector(0), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_table_is_merged_in_pieces(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows, the last one shorter: the same merge to rounding."""
    vectors = task_vectors((700, 40), 0.01, "of a fine-tune", dtype)
    options = replace(WITH_MOMENTS, refinement=None)
    whole = merge_by_covariance(vectors, options).task_vector
    monkeypatch.setattr(blocks, "_OF_A_PRODUCT", 64 * 40)
    assert [piece.stop - piece.start for piece in blocks.row_slices(700, 40)] == [*[64] * 10, 60]
    pieces = merge_by_covariance(vectors, options).task_vector
    rounding = torch.finfo(pieces.dtype).eps
    torch.testing.assert_close(pieces, whole, rtol=0, atol=50 * rounding * float(whole.abs().max()))
