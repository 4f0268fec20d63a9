"""What `merge_method: ace` computes without parameters, step by step: ACE with a ridge and a refinement of no constant.

Against the published steps (`tests/reference/ace.py`): second moments are not centered and always divided by their
trace, the ridge is oracle-approximating shrinkage, there is no prior, the preliminary merge itself is refined by as
much as the experts disagree, and the result is bounded in what it retains, and in length, as far as the updates are
large for the base. Updates of low rank are held nearer to the base, and merged by balanced task
singular vectors where their second moments do not correlate, or averaged as far as they are large for the base.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tests.reference.subspace import top_isometry, truncated
from tests.reference.tsv import tsv_m
from tests.reference.weights import participants

CORRELATION = 0.05
NEARLY_ALL = 0.9
LEAST_SHRINKAGE = 0.95
TOLERATED_NOISE, TOLERATED_UPDATE = 0.1, 0.125
TYPICAL_DEPTH = 32


def shrinkage(second_moment: Tensor, samples: int) -> float:
    """Share of the identity in oracle-approximating shrinkage, Chen et al. 2010, Eq. 23."""
    n = second_moment.shape[0]
    trace, squared = float(second_moment.trace()), float((second_moment @ second_moment).trace())
    spread = squared - trace**2 / n
    if spread <= 0:
        return 1.0
    return min(1.0, ((1 - 2 / n) * squared + trace**2) / ((samples + 1 - 2 / n) * spread))


def distinct(D: list[Tensor], a: list[float]) -> tuple[list[Tensor], list[float]]:
    """Copies are one expert of their summed weight; weights of mean 1."""
    kept: list[Tensor] = []
    weights: list[float] = []
    for d, a_t in zip(D, a, strict=True):
        same = [i for i, other in enumerate(kept) if torch.equal(d, other)]
        if same:
            weights[same[0]] += a_t
        else:
            kept.append(d)
            weights.append(a_t)
    return kept, [w * len(kept) / sum(weights) for w in weights]


def correlation(S: list[Tensor], a: list[float]) -> float:
    """Weighted mean correlation, over pairs, of the deviations of second moments of trace 1 from the identity's."""
    n = S[0].shape[0]
    deviations = [a_t * (s - torch.eye(n, dtype=s.dtype) / n) for a_t, s in zip(a, S, strict=True)]
    pairs = [(x, y) for i, x in enumerate(deviations) for j, y in enumerate(deviations) if i != j]
    most = float(sum(x.norm() * y.norm() for x, y in pairs))
    return float(sum((x * y).sum() for x, y in pairs)) / most if most > 0 else 1.0


def captured(d: Tensor) -> float:
    """Share of the energy in an eighth of the directions, 128 at most."""
    energies = torch.linalg.svdvals(d.double()).square()
    few = min(128, max(1, len(energies) // 8))
    return float(energies[:few].sum() / energies.sum())


def effective(D: list[Tensor], a: list[float]) -> float:
    """How many orthogonal updates of one length these amount to, by the length of their mean; from 1 to `T^2`."""
    T = len(D)
    mean = float((sum(a_t * d for a_t, d in zip(a, D, strict=True)) / T).norm()) ** 2
    energy = sum(a_t * float(d.norm()) ** 2 for a_t, d in zip(a, D, strict=True)) / T
    return min(float(T**2), max(1.0, energy / mean)) if mean > 0 else float(T**2)


def evened(d: Tensor, k: int, power: float) -> Tensor:
    """The top k singular directions, their values raised to a power and scaled to their norm before."""
    U, s, Vh = truncated(d, k)
    known = s > 0
    U, s, Vh = U[:, known], s[known], Vh[known]
    return U @ torch.diag(s**power * s.norm() / (s**power).norm()) @ Vh


def balanced(D: list[Tensor], a: list[float]) -> Tensor:
    """Task singular vectors of evened updates, weighted by the inverse root of their norms."""
    weights = torch.tensor([a_t / float(d.norm()) ** 0.5 for a_t, d in zip(a, D, strict=True)], dtype=torch.float64)
    weights = weights / weights.mean()
    k = max(1, min(D[0].shape) // len(D))
    power = 1 / effective(D, a)
    return tsv_m([evened(d, k, power) for d in D], weights.tolist(), dtype=D[0].dtype)


def size(D: list[Tensor], a: list[float], base_norm: float) -> float:
    """Of an update in the mean, relative to the base."""
    update = sum(a_t * float(d.norm()) ** 2 for a_t, d in zip(a, D, strict=True)) / len(D)
    return math.sqrt(update) / base_norm


def share_of_large(D: list[Tensor], a: list[float], base_norm: float | None, depth: int = TYPICAL_DEPTH) -> float:
    """How far updates of every block are large for the base; 0 where its norm is not known."""
    if base_norm is None:
        return 0.0
    summed = math.sqrt(depth) * size(D, a, base_norm)
    return summed**4 / (summed**4 + TOLERATED_UPDATE**4)


def without_moments(D: list[Tensor], a: list[float], base_norm: float | None) -> Tensor:
    """That of small updates, the average of large ones: a half where the other experts are a tenth of the base."""
    if base_norm is None:
        return balanced(D, a)
    mean = sum(a_t * d for a_t, d in zip(a, D, strict=True)) / len(D)
    noise = (effective(D, a) - 1) * size(D, a, base_norm) ** 2
    averaged = noise / (noise + TOLERATED_NOISE**2)
    return (1 - averaged) * balanced(D, a) + averaged * mean


def ace_default(
    task_vectors: Sequence[Tensor],
    weights: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float64,
    spectral_fraction: float = 0.3,
    relative_rank: float | None = None,
    base_norm: float | None = None,
    depth: int = TYPICAL_DEPTH,
    head: bool = False,
) -> Tensor:
    """The merged task vector of one layer, `[m, n]`, computed in `dtype`; of an output head if `head`."""
    D, a = participants(task_vectors, weights, dtype)
    if not D:
        return torch.zeros_like(task_vectors[0], dtype=dtype)
    D, a = distinct(D, a)
    if len(D) == 1:
        return D[0].clone()
    T = len(D)
    m, n = D[0].shape
    identity = torch.eye(n, dtype=dtype)

    low_rank = not head and sum(a_t * captured(d) for a_t, d in zip(a, D, strict=True)) / T >= NEARLY_ALL

    # 1. Second moments of trace 1, shrunk towards the identity of the same trace; an adapter's nearly to it.
    S = []
    for d in D:
        G = d.T @ d
        rho = max(shrinkage(G, samples=m), LEAST_SHRINKAGE if low_rank else 0.0)
        S.append(((1 - rho) * G + rho * G.trace() / n * identity) / G.trace())

    # Second moments of adapters that do not correlate are no second moments of the inputs: a mean.
    if low_rank and correlation(S, a) < CORRELATION:
        return without_moments(D, a, base_norm)

    # 2. The weight of least interference.
    numerator = sum(a_t * (d @ s) for a_t, d, s in zip(a, D, S, strict=True))
    W = numerator @ torch.linalg.inv(sum(a_t * s for a_t, s in zip(a, S, strict=True)))

    # 3. How many independent updates the experts' amount to.
    mean_energy = float(sum(a_t * d.square().sum() for a_t, d in zip(a, D, strict=True))) / T
    independent = effective(D, a)

    # 4. Refinement by as much as they disagree.
    k = math.floor(spectral_fraction * min(m, n))
    if k > 0 and not head:
        isometry, values = top_isometry(W, k, relative_rank)
        W = W + (1 - 1 / independent) * values.mean() * isometry

    large = share_of_large(D, a, base_norm, depth)

    # 5. Retention bound: the mean response under the experts' second moments is at most their own, as far as updates
    # are large for the base; of heads, and of updates of low rank, always.
    own = float(sum(a_t * ((d @ s) * d).sum() for a_t, d, s in zip(a, D, S, strict=True)))
    retention = float((W * numerator).sum()) / own
    factor = max(1.0, retention) ** -(1.0 if head or low_rank else large)

    # 6. Of heads, the average as far as updates are large for the base. Of others, what is beyond half the way from one
    # update to the sum of so many orthogonal ones is taken off as far, on a logarithmic scale; and no more than twice
    # all updates laid end to end is left (of low rank, no more than that half).
    if head:
        mean = sum(a_t * d for a_t, d in zip(a, D, strict=True)) / T
        return (1 - large) * factor * W + large * mean
    held = math.sqrt(math.sqrt(independent) * mean_energy)
    length = factor * float(W.norm())
    if length > held:
        factor = factor * (held / length) ** large
    end_to_end = sum(a_t * float(d.norm()) for a_t, d in zip(a, D, strict=True))
    longest = held if low_rank else 2 * end_to_end
    return W * min(factor, longest / float(W.norm()))
