"""Second moments in bfloat16: what they do to a merge is estimated, and within what the output allows."""

from dataclasses import replace

import pytest
import torch

from mergekit_ace.linalg import bfloat16
from mergekit_ace.linalg.cholesky import cholesky_factor
from mergekit_ace.matrix import matrix_weights, rough_moments
from mergekit_ace.matrix.budget import SHARE_OF_ROUNDING
from mergekit_ace.matrix.decision import decide
from mergekit_ace.matrix.from_reference import assemble_from_reference
from mergekit_ace.matrix.merge import merge_by_covariance
from mergekit_ace.matrix.options import Bounds
from mergekit_ace.matrix.presets import ACE as DEFAULT
from mergekit_ace.matrix.stored_task_vectors import StoredTaskVectors
from mergekit_ace.matrix.task_vectors import TaskVectors
from tests.matrix.test_budget import SPECTRA, error_and_rounding, task_vectors

# Rounding has made updates of so small matrices look like those of adapters.
ACE = replace(DEFAULT, correlation_threshold=0.0, bounds=Bounds(retention=True))
SHAPES = [(320, 128), (640, 128), (300, 150)]


@pytest.fixture(autouse=True)
def in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that multiplies bfloat16 faster: its products are the same on others."""
    monkeypatch.setattr(bfloat16, "is_faster", lambda *_: True)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_estimate_is_that_of_the_error(
    shape: tuple[int, int], spectrum: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = task_vectors(shape, 0.001, spectrum, torch.bfloat16)
    decision = decide(vectors, ACE)
    exact = assemble_from_reference(vectors, ACE, decision)
    factor = cholesky_factor(exact.system, what="the system")  # type: ignore[attr-defined]
    assert rough_moments.is_below_the_ridge(exact.moments, vectors.shares, shape[1])
    estimate = rough_moments.estimated_error(vectors, exact.moments, factor)
    in_full = TaskVectors.gram
    monkeypatch.setattr(TaskVectors, "gram", lambda self, t: in_full(self, t, rough=True))
    rounded = assemble_from_reference(vectors, ACE, decision).solve().weight
    error = float((rounded - exact.solve().weight).norm())
    assert 0.5 * estimate < error < 1.5 * estimate


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("size", [0.0003, 0.001, 0.002])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_error_is_within_an_eighth_of_the_rounding(shape: tuple[int, int], size: float, spectrum: str) -> None:
    vectors = task_vectors(shape, size, spectrum, torch.bfloat16)
    assert rough_moments.allowed_error(vectors, ACE, decide(vectors, ACE)) > 0
    merged = merge_by_covariance(vectors, ACE)
    error, rounding = error_and_rounding(vectors, merged.task_vector, ACE)
    assert error <= SHARE_OF_ROUNDING * rounding


def test_second_moments_that_may_not_be_rounded_are_products_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = task_vectors((320, 128), 0.001, "of a fine-tune", torch.bfloat16)
    asked = []
    in_full = TaskVectors.gram

    def gram(self: TaskVectors, t: int, *, rough: bool = False) -> torch.Tensor:
        asked.append(rough)
        return in_full(self, t, rough=rough)

    monkeypatch.setattr(TaskVectors, "gram", gram)
    merge_by_covariance(vectors, ACE)
    assert asked == [True] * 3
    for refused, answer in (("estimated_error", 1.0), ("is_below_the_ridge", False)):
        asked.clear()
        with monkeypatch.context() as patched:
            patched.setattr(rough_moments, refused, lambda *_, answer=answer: answer)
            merged = merge_by_covariance(vectors, ACE).task_vector
        assert asked == [True] * 3 + [False] * 3
        with monkeypatch.context() as patched:
            patched.setattr(rough_moments, "allowed_error", lambda *_: 0.0)
            assert torch.equal(merged, merge_by_covariance(vectors, ACE).task_vector)


def test_large_updates_square_matrices_and_full_precision_are_not_rounded() -> None:
    def allowed(shape: tuple[int, int], size: float, dtype: torch.dtype, precision: str = "auto") -> float:
        vectors = task_vectors(shape, size, "of a fine-tune", dtype)
        options = replace(ACE, precision=precision)  # type: ignore[arg-type]
        return rough_moments.allowed_error(vectors, options, decide(vectors, options))

    assert allowed((320, 128), 0.001, torch.bfloat16) > 0
    assert allowed((320, 128), 0.01, torch.bfloat16) == 0
    assert allowed((160, 128), 0.001, torch.bfloat16) == 0
    assert allowed((320, 128), 0.001, torch.float32) == 0
    assert allowed((320, 128), 0.001, torch.bfloat16, "full") == 0


def test_equal_experts_give_that_expert() -> None:
    """Numerator and system have the same rounded second moments."""
    vectors = task_vectors((320, 128), 0.001, "of a fine-tune", torch.bfloat16, count=1)
    thrice = StoredTaskVectors(vectors.base, [replace(vectors.experts[0], name=str(t)) for t in range(3)])
    options = replace(ACE, combine_copies=False)
    assert matrix_weights.suits(thrice, options, decide(thrice, options))
    torch.testing.assert_close(
        merge_by_covariance(thrice, options).task_vector, vectors.task_vector(0), rtol=1e-4, atol=0
    )
