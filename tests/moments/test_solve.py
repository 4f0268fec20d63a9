"""One matrix merged by measured second moments, against the formula written out in float64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mergekit_ace.matrix.expert import Expert, MeasuredMoment
from mergekit_ace.matrix.merge import merge_by_covariance
from mergekit_ace.matrix.presets import ACE, ACE_PUBLISHED, ACTMAT, WUDI
from mergekit_ace.matrix.stored_task_vectors import StoredTaskVectors

# Products and solves in float32 of systems whose condition stays below a thousand.
TOLERANCE = 1e-4


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def oas(rows: Tensor) -> Tensor:
    """The estimate: `D^T D` shrunk towards the identity, of its own trace (Chen et al. 2010, Eq. 23)."""
    m, n = rows.shape
    gram = rows.T @ rows
    trace, square = gram.trace(), gram.square().sum()
    rho = ((1 - 2 / n) * square + trace**2) / ((m + 1 - 2 / n) * (square - trace**2 / n))
    rho = rho.clamp(max=1)
    return (1 - rho) * gram + rho * trace / n * torch.eye(n, dtype=rows.dtype)


def shrunk(moment: Tensor, error: float, estimate: Tensor) -> Tensor:
    """Correlations shrunk towards the estimate's, own diagonal, the estimate's trace."""
    own, other = moment.diagonal().sqrt(), estimate.diagonal().sqrt()
    correlations = (1 - error) * moment / torch.outer(own, own) + error * estimate / torch.outer(other, other)
    return torch.outer(own, own) * correlations * (estimate.trace() / moment.trace())


def pooled(moment: Tensor, error: float, tokens: int, estimate: Tensor, rows: int) -> Tensor:
    """The mean over the measured inputs and the rows of the update."""
    return (tokens * shrunk(moment, error, estimate) + rows * estimate) / (tokens + rows)


def expected(
    updates: list[Tensor],
    moments: list[Tensor | None],
    errors: list[float],
    weights: list[float],
    *,
    tokens: int,
    normalized: bool,
) -> Tensor:
    """Of updates of full rank."""
    system = torch.zeros(updates[0].shape[1], updates[0].shape[1], dtype=torch.float64)
    numerator = torch.zeros(updates[0].shape, dtype=torch.float64)
    for update, moment, error, weight in zip(updates, moments, errors, weights, strict=True):
        rows = update.double()
        proxy = oas(rows) / (rows.square().sum() if normalized else 1)
        if moment is not None:
            proxy = pooled(moment.double(), error, tokens, proxy, len(rows))
        system += weight * proxy
        numerator += weight * rows @ proxy
    return numerator @ torch.linalg.inv(system)


@pytest.mark.parametrize(("options", "normalized"), [(WUDI, True), (ACTMAT, False)])
@pytest.mark.parametrize(("m", "n"), [(24, 40), (40, 24)])
@pytest.mark.parametrize("tokens", [12, 100])
@pytest.mark.parametrize("everybody", [True, False])
def test_the_solve(options: object, normalized: bool, m: int, n: int, tokens: int, everybody: bool) -> None:
    """Fewer and more tokens than inputs; with and without an expert that keeps its estimate."""
    updates = [(t + 1) * numbers(m, n, seed=t) for t in range(3)]
    factors = [numbers(tokens, n, seed=10 + t) @ numbers(n, n, seed=20) / tokens**0.5 for t in range(3)]
    errors = [0.1, 0.4, 0.7]
    measured = [everybody or t != 1 for t in range(3)]
    base = numbers(m, n, seed=5)
    experts = [
        Expert(
            name=f"expert{t}",
            tensor=base + updates[t],
            weight=(1.0, 2.0, 0.5)[t],
            measured=MeasuredMoment(factor=factors[t], error=errors[t], tokens=tokens) if measured[t] else None,
        )
        for t in range(3)
    ]
    merge = merge_by_covariance(StoredTaskVectors(base, experts), options)  # type: ignore[arg-type]
    moments = [
        factor.double().T @ factor.double() if known else None for factor, known in zip(factors, measured, strict=True)
    ]
    target = expected(
        [expert.tensor - base for expert in experts],
        moments,
        errors,
        [1.0, 2.0, 0.5],
        tokens=tokens,
        normalized=normalized,
    )
    assert float((merge.task_vector - target).norm()) < TOLERANCE * float(target.norm())
    assert merge.measured == sum(measured)


def test_inputs_that_never_differ_from_zero_leave_the_system_solvable() -> None:
    """The merge of adapters is exact on the inputs that each expert has."""
    updates = [numbers(6, 1, seed=t) @ numbers(1, 8, seed=10 + t) for t in range(2)]
    factors = [torch.eye(8)[:4], torch.eye(8)[4:]]
    base = torch.zeros(6, 8)
    experts = [
        Expert(name=str(t), tensor=updates[t], measured=MeasuredMoment(factor=factors[t], error=0.0, tokens=4))
        for t in range(2)
    ]
    merged = merge_by_covariance(StoredTaskVectors(base, experts), WUDI).task_vector
    torch.testing.assert_close(merged[:, :4], updates[0][:, :4], rtol=0, atol=1e-5)
    torch.testing.assert_close(merged[:, 4:], updates[1][:, 4:], rtol=0, atol=1e-5)


def test_moments_that_are_all_zero_leave_the_estimate() -> None:
    base = numbers(6, 8, seed=9)
    plain = [Expert(name=str(t), tensor=base + numbers(6, 8, seed=t)) for t in range(2)]
    zero = [replace(expert, measured=MeasuredMoment(factor=torch.zeros(3, 8), error=0.5, tokens=3)) for expert in plain]
    merges = [merge_by_covariance(StoredTaskVectors(base, experts), WUDI).task_vector for experts in (plain, zero)]
    torch.testing.assert_close(merges[0], merges[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [2, 40])
def test_the_number_of_tokens_counts_against_the_rows_of_full_updates_alone(rank: int) -> None:
    """The rows of an adapter's update are combinations of a few, and no samples of its inputs."""
    base = numbers(64, 48, seed=9)
    merges = []
    for tokens in (10, 1000):
        experts = []
        for t in range(2):
            update = numbers(64, rank, seed=t) @ numbers(rank, 48, seed=10 + t)
            measured = MeasuredMoment(factor=numbers(60, 48, seed=20 + t), error=0.1, tokens=tokens)
            experts.append(Expert(name=str(t), tensor=base + update, measured=measured))
        merges.append(merge_by_covariance(StoredTaskVectors(base, experts), WUDI).task_vector)
    moved = float((merges[0] - merges[1]).norm() / merges[0].norm())
    assert (moved < 1e-5) if rank == 2 else (moved > 0.05)


@pytest.mark.parametrize("scale", [1e3, 1e-3])
def test_measured_adapters_are_held_as_far_as_they_are_large_for_their_base(scale: float) -> None:
    """Small ones to twice all updates end to end, as full fine-tunes; large ones half the way to orthogonal updates."""
    base = scale * numbers(64, 48, seed=9)
    updates = [numbers(64, 2, seed=t) @ numbers(2, 48, seed=10 + t) for t in range(3)]
    measured = [MeasuredMoment(factor=numbers(30, 48, seed=20 + t), error=0.2, tokens=30) for t in range(3)]
    experts = [Expert(name=str(t), tensor=base + updates[t], measured=measured[t]) for t in range(3)]
    decision = merge_by_covariance(StoredTaskVectors(base, experts), ACE).decision
    assert decision is not None
    end_to_end = 2 * sum(float(update.norm()) for update in updates)
    energy = sum(float(update.square().sum()) for update in updates) / 3
    independent = energy / float((sum(updates) / 3).square().sum())  # type: ignore[union-attr]
    assert decision.longest == pytest.approx(end_to_end if scale > 1 else (independent**0.5 * energy) ** 0.5, rel=1e-3)


def test_adapters_stay_adapters() -> None:
    """Every column of the merge is one of the columns that the experts' updates span, to rounding."""
    left = [numbers(64, 2, seed=t) for t in range(3)]
    base = numbers(64, 48, seed=9)
    experts = [
        Expert(
            name=str(t),
            tensor=base + left[t] @ numbers(2, 48, seed=10 + t) / 10,
            measured=MeasuredMoment(factor=numbers(30, 48, seed=20 + t), error=0.2, tokens=30),
        )
        for t in range(3)
    ]
    basis = torch.linalg.qr(torch.cat(left, dim=1)).Q
    for options in (WUDI, ACE):
        merged = merge_by_covariance(StoredTaskVectors(base, experts), options).task_vector
        outside = merged - basis @ (basis.T @ merged)
        assert float(outside.norm()) < 1e-4 * float(merged.norm())


def test_the_published_preset_takes_no_measured_moments() -> None:
    base = numbers(6, 8, seed=9)
    experts = [
        Expert(
            name=str(t),
            tensor=numbers(6, 8, seed=t),
            measured=MeasuredMoment(factor=torch.eye(8), error=0.1, tokens=8),
        )
        for t in range(2)
    ]
    with pytest.raises(ValueError, match="layer: measured second moments cannot be combined with preset: published"):
        merge_by_covariance(StoredTaskVectors(base, experts, name="layer"), ACE_PUBLISHED)
