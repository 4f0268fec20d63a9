"""Tensors longer than a block, a panel or a buffer give the merge of those that are not: all pieces, each once."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from mergekit_ace.factors.core_space import core_space, task_vectors_of
from mergekit_ace.linalg import blocks
from mergekit_ace.linalg.factors import Factors
from mergekit_ace.matrix.averaging import mean_task_vector
from mergekit_ace.matrix.expert import Expert, MeasuredMoment, Participant
from mergekit_ace.matrix.merge import merge_by_covariance
from mergekit_ace.matrix.options import Bounds
from mergekit_ace.matrix.presets import ACE, ACE_HEAD, ACE_PUBLISHED
from mergekit_ace.matrix.storage_rounding import rounding_energy
from mergekit_ace.matrix.stored_task_vectors import StoredTaskVectors
from mergekit_ace.matrix.task_vectors import TaskVectors
from tests.adapters.test_core_space import drawn
from tests.linalg.matrices import of_rank
from tests.matrix.experts import layer, steep_updates
from tests.matrix.test_budget import task_vectors

SOLVED = replace(ACE, correlation_threshold=0.0, bounds=Bounds(retention=True))
OPTIONS = {"ace": ACE, "solved": SOLVED, "head": ACE_HEAD, "published": ACE_PUBLISHED}
LAYERS: dict[str, Callable[[], TaskVectors]] = {
    "tall": lambda: layer(steep_updates(50, 20, 2)),
    "square": lambda: layer(steep_updates(40, 40, 3)),
    "wide": lambda: layer(steep_updates(30, 40, 3)),
    "few rows": lambda: layer(steep_updates(8, 64, 3)),
    "rounded": lambda: task_vectors((40, 30), 0.01, "of a fine-tune", torch.bfloat16),
}


def in_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_ON_THE_CPU", 40)
    monkeypatch.setattr(blocks, "_PANEL", 1)
    monkeypatch.setattr(blocks, "_FEWEST_ROWS", 7)
    monkeypatch.setattr(blocks, "_OF_A_PRODUCT", 300)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", LAYERS)
def test_merges(kind: str, options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = LAYERS[kind]()
    expected = merge_by_covariance(whole, OPTIONS[options])
    in_small_pieces(monkeypatch)
    vectors = LAYERS[kind]()
    merged = merge_by_covariance(vectors, OPTIONS[options])
    rounding = 100 * torch.finfo(merged.task_vector.dtype).eps
    assert vectors.energies == pytest.approx(whole.energies, rel=rounding)
    assert [s.centered_energy for s in vectors.statistics] == pytest.approx(
        [s.centered_energy for s in whole.statistics], rel=rounding
    )
    assert vectors.energy_of_mean == pytest.approx(whole.energy_of_mean, rel=rounding)
    assert vectors.output_rounding == pytest.approx(whole.output_rounding, rel=rounding)
    scale = float(expected.task_vector.abs().max())
    torch.testing.assert_close(merged.task_vector, expected.task_vector, rtol=0, atol=1e3 * rounding * scale)
    if expected.retention is not None:
        assert merged.retention == pytest.approx(expected.retention, rel=1e3 * rounding)


@pytest.mark.parametrize("rough", [False, True])
def test_second_moments(rough: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = layer(steep_updates(50, 20, 2), dtype=torch.float32)
    exact = vectors.task_vector(1).double().T @ vectors.task_vector(1).double()
    in_small_pieces(monkeypatch)
    assert len(vectors.row_panels()) == 8
    error = float((vectors.gram(1, rough=rough).double() - exact).norm() / exact.norm())
    assert error < (1e-2 if rough else 1e-6)


def test_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over the rows of a matrix are taken by the coordinates of the column of ones."""
    left, right = [drawn(60, 4, seed=t) for t in range(3)], [drawn(4, 50, seed=10 + t) for t in range(3)]
    updates = [u @ v for u, v in zip(left, right, strict=True)]
    exact = [float((update - update.mean(dim=0)).square().sum()) for update in updates]
    space = core_space([Factors(left=u, right=v) for u, v in zip(left, right, strict=True)])
    in_small_pieces(monkeypatch)
    experts = [Participant(name=str(t)) for t in range(3)]
    vectors = task_vectors_of(space, experts, name="w")
    assert [s.centered_energy for s in vectors.statistics] == pytest.approx(exact, rel=1e-9)


def test_measured_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = layer(steep_updates(20, 24, 2))
    moment = MeasuredMoment(factor=of_rank(30, 24, 24), error=0.2, tokens=30)
    known = StoredTaskVectors(vectors.base, [replace(expert, measured=moment) for expert in vectors.experts])
    expected = merge_by_covariance(known, ACE).task_vector
    in_small_pieces(monkeypatch)
    torch.testing.assert_close(merge_by_covariance(known, ACE).task_vector, expected, rtol=1e-9, atol=1e-9)


def test_means(monkeypatch: pytest.MonkeyPatch) -> None:
    base, one, two = (drawn(30, 20, seed=seed) for seed in range(3))
    in_small_pieces(monkeypatch)
    experts = [Expert(name="one", tensor=one), Expert(name="two", tensor=two, weight=3.0)]
    torch.testing.assert_close(mean_task_vector(base, experts, name="table"), (one + 3 * two) / 4 - base)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16])
def test_the_energy_of_rounding(storage: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    values = drawn(30, 20, seed=0).float()
    real = float((values.to(storage).double() - values.double()).square().sum())
    in_small_pieces(monkeypatch)
    assert float(rounding_energy(values, storage)) == pytest.approx(real, rel=0.15)
