"""How much the experts' updates of a layer agree."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_ace.layer.ridge import Regularized
from mergekit_ace.layer.task_vectors import TaskVectors


def effective_experts(task_vectors: TaskVectors) -> float:
    """How many independent updates the experts' amount to: 1 when all are the same, `T` when all are orthogonal.

        T_eff = mean_t(a_t e_t) / ||mean_t(a_t D_t)||_F^2,    e_t = ||D_t||_F^2

    The squared length of a mean of `T` orthogonal vectors of one length is a `T`-th of their squared length. An expert
    and its copy count as one of twice the weight. Updates that oppose one another are more than independent, at most
    `T^2`.

    Args:
        task_vectors: of at least one expert.
    """
    count = len(task_vectors)
    mean = task_vectors.energy_of_mean
    # Rounding may put the ratio of identical updates a little below one.
    return min(float(count**2), max(1.0, mean_energy(task_vectors) / mean)) if mean > 0 else float(count**2)


def mean_energy(task_vectors: TaskVectors) -> float:
    """`mean_t(a_t e_t)`, the squared length of an update in the mean."""
    weighted = zip(task_vectors.shares, task_vectors.energies, strict=True)
    return sum(share * energy for share, energy in weighted) / len(task_vectors)


def moment_correlation(
    proxies: Sequence[Regularized], shares: Sequence[float], *, summed_squared_norm: float, dimensions: int
) -> float:
    """Weighted mean correlation of the experts' second moments about the identity, in `[0, 1]`.

    With `S_t = G_t / tr G_t` and `E_t = S_t - I/n`, over all pairs of two different experts,

        sum_{s != t} w_s w_t <E_s, E_t> / sum_{s != t} w_s w_t ||E_s|| ||E_t||,    w_t = a_t scale_t tr G_t

    Experts of one base see inputs of much the same covariance, so their second moments correlate; row spaces that are a
    random start of training (a LoRA's `A`) do not. No pair of products is formed: `||sum_t w_t S_t||_F^2` holds all of
    them. Second moments that are multiples of the identity have nothing to correlate: 1.

    Args:
        proxies: with their squared norms.
        shares: `a_t`.
        summed_squared_norm: `||sum_t a_t scale_t G_t||_F^2`.
        dimensions: `n`.
    """
    weights, squares = [], []
    for proxy, share in zip(proxies, shares, strict=True):
        assert proxy.squared_norm is not None
        weights.append(share * proxy.scale * proxy.trace)
        squares.append(proxy.squared_norm / proxy.trace**2 if proxy.trace > 0 else 0.0)
    lengths = [max(0.0, square - 1 / dimensions) ** 0.5 for square in squares]
    own = sum(w * w for w in weights)
    together = summed_squared_norm - sum(w * w * square for w, square in zip(weights, squares, strict=True))
    together -= (sum(weights) ** 2 - own) / dimensions
    most = sum(w * length for w, length in zip(weights, lengths, strict=True)) ** 2
    most -= sum((w * length) ** 2 for w, length in zip(weights, lengths, strict=True))
    return min(1.0, max(0.0, together / most)) if most > 0 else 1.0
