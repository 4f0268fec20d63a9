"""Adapters and full fine-tunes are told apart whatever the format and the size of their updates."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from mergekit_ace.matrix import decision
from mergekit_ace.matrix.decision import _weighted_mean, low_rank_share, noise_share
from mergekit_ace.matrix.expert import Expert
from mergekit_ace.matrix.stored_task_vectors import StoredTaskVectors
from mergekit_ace.matrix.task_vectors import TaskVectors

SIZES = [0.001, 0.003, 0.01, 0.05]
FORMATS = [torch.float32, torch.bfloat16, torch.float16]
SIDE = 512


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def of_rank(rank: int, seed: int) -> Tensor:
    return normal(SIDE, rank, seed=seed) @ normal(rank, SIDE, seed=seed + 50)


def of_full_rank(seed: int) -> Tensor:
    """With the spectrum of a real fine-tune: an eighth of the directions holds about half of the energy."""
    values = (1 + 77 * torch.arange(SIDE) / SIDE) ** -0.8
    return (normal(SIDE, SIDE, seed=seed) * values) @ normal(SIDE, SIDE, seed=seed + 50)


def stored(updates: list[Tensor], size: float, storage: torch.dtype) -> TaskVectors:
    """Experts whose updates are a share of the base's norm; base and experts in one format."""
    # float32 checkpoints often hold a base that was published in bfloat16
    base = (0.04 * normal(SIDE, SIDE, seed=1)).to(torch.bfloat16 if storage == torch.float32 else storage).to(storage)
    norm = float(base.float().norm())
    experts = [
        Expert(name=str(t), tensor=(base.float() + size * norm / update.norm() * update).to(storage))
        for t, update in enumerate(updates)
    ]
    return StoredTaskVectors(base, experts)


@pytest.mark.parametrize("storage", FORMATS, ids=str)
@pytest.mark.parametrize("rank", [4, 16])
def test_adapters_of_every_size_and_format_are_of_low_rank(rank: int, storage: torch.dtype) -> None:
    for size in SIZES:
        found = low_rank_share(stored([of_rank(rank, 2), of_rank(rank, 3)], size, storage))
        # The smallest updates in 16 bits lose some or most of their energy: the estimate of what is left has an error.
        assert found == 1 if storage == torch.float32 or size >= 0.01 else found >= 0.8


@pytest.mark.parametrize("storage", FORMATS, ids=str)
def test_full_fine_tunes_of_every_size_and_format_are_not(storage: torch.dtype) -> None:
    for size in SIZES:
        assert low_rank_share(stored([of_full_rank(2), of_full_rank(3)], size, storage)) == 0


def test_what_rounding_hides_comes_back_gradually() -> None:
    """Rank 64 fills all of the directions that are looked at: the larger the update, the surer the rank."""
    updates = [of_rank(64, 2), of_rank(64, 3)]
    shares = [low_rank_share(stored(updates, size, torch.bfloat16)) for size in (0.001, 0.002, 0.003, 0.004, 0.01)]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert sum(0 < share < 1 for share in shares) >= 2


def test_a_sample_that_misses_an_update_is_no_estimate_of_it() -> None:
    """Of 1100 rows every second one is sampled: an update of the others alone, and one with a little noise."""
    side = 1100
    base, adapter = 0.02 * normal(side, side, seed=1), normal(side, 4, seed=2) @ normal(4, side, seed=3)
    adapter[::2] = 0.0
    noise = 1e-3 * normal(side, side, seed=4)
    full = normal(side, side, seed=5)
    full[::2] = 0.0
    for update, share in ((adapter, 1.0), (adapter + noise, 1.0), (full, 0.0)):
        vectors = StoredTaskVectors(base, [Expert(name="e", tensor=base + 1e-3 * update)])
        assert low_rank_share(vectors) == share


def test_the_sample_has_sides_of_a_limited_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the smaller side so many rows or columns at most, of the larger one twice as many."""
    monkeypatch.setattr(decision, "_SAMPLED", (16, 32))
    steps = []
    original = StoredTaskVectors.sample

    def sample(self: StoredTaskVectors, t: int, *, row_step: int, column_step: int) -> Tensor:
        steps.append((row_step, column_step))
        return original(self, t, row_step=row_step, column_step=column_step)

    monkeypatch.setattr(StoredTaskVectors, "sample", sample)
    for shape in ((40, 100), (100, 40), (40, 40), (17, 32), (16, 100)):
        base, update = torch.zeros(shape), normal(*shape, seed=1)
        low_rank_share(StoredTaskVectors(base, [Expert(name="e", tensor=update)]))
    assert steps == [(3, 4), (4, 3), (3, 3), (2, 1)]


def test_a_mean_is_given_up_as_soon_as_it_cannot_be_reached() -> None:
    """One expert after the other on a CPU, all at once on an accelerator, which is waited for once."""
    values, asked = [0.9, 0.5, 0.7, 1.0], []

    def some(experts: Sequence[int]) -> list[float]:
        asked.append(list(experts))
        return [values[t] for t in experts]

    vectors = StoredTaskVectors(torch.zeros(4, 4), [Expert(name=str(t), tensor=normal(4, 4, seed=t)) for t in range(4)])
    assert _weighted_mean(vectors, some, enough=0.7) == pytest.approx(3.1 / 4)
    assert asked == [[0], [1], [2], [3]]
    asked.clear()
    # 1 - (0.1 + 0.5) / 4 is 0.85 after two
    assert _weighted_mean(vectors, some, enough=0.86) is None
    assert asked == [[0], [1]]
    asked.clear()
    assert _weighted_mean(vectors.with_shares([0.4, 0.4, 2.8, 0.4]), some, enough=0.0) == pytest.approx(0.73)
    vectors.device = torch.device("meta")
    asked.clear()
    assert _weighted_mean(vectors, some, enough=0.86) is None
    assert asked == [[0, 1, 2, 3]]
    values[:] = [1.0, 1.0, 1.0, 1.0]
    assert _weighted_mean(vectors, some, enough=1.0) is None


@pytest.mark.parametrize(("m", "n", "directions"), [(512, 512, 64), (200, 800, 25), (800, 200, 10), (300, 300, 300)])
def test_noise_share_is_that_of_random_matrices(m: int, n: int, directions: int) -> None:
    energies = torch.linalg.svdvals(normal(m, n, seed=0).double()).square()
    assert noise_share(m, n, directions) == pytest.approx(float(energies[:directions].sum() / energies.sum()), rel=0.02)


@pytest.mark.parametrize(("held", "expected"), [(0.88, 0.0), (0.92, 0.25), (0.94, 0.5), (0.97, 0.875), (0.99, 1.0)])
def test_the_share_grows_with_the_energy_in_few_directions(held: float, expected: float) -> None:
    values = torch.ones(64, dtype=torch.float64)
    values[:8] = (held / (1 - held) * 56 / 8) ** 0.5
    left = torch.linalg.qr(normal(64, 64, seed=4).double()).Q
    task_vectors = StoredTaskVectors(torch.zeros(64, 64, dtype=torch.float64), [Expert(name="e", tensor=left * values)])
    assert low_rank_share(task_vectors) == pytest.approx(expected, abs=1e-3)
