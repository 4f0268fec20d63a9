"""Task vectors of low rank in coordinates that they share: one core at a time is formed of its factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mergekit_ace.linalg.blocks import row_slices
from mergekit_ace.linalg.factors import Factors, weighted_sum
from mergekit_ace.linalg.precision import require_full_float32, squared_norm
from mergekit_ace.linalg.subspace import SingularTriples, singular_triples_of_product
from mergekit_ace.linalg.symmetric import gram
from mergekit_ace.matrix.coordinates import Coordinates
from mergekit_ace.matrix.expert import Participant, require_finite_factors, voting_experts
from mergekit_ace.matrix.task_vectors import TaskVectors, UpdateStatistics, statistics_of


@dataclass(frozen=True, kw_only=True)
class CoreExpert(Participant):
    """One expert's update in shared coordinates.

    Attributes:
        core: factors of `M_t`, `[p, q]`.
    """

    core: Factors


class CoreTaskVectors(TaskVectors):
    """Cores `M_t` of `D_t = U M_t V`, `U` `[m, p]` and `V` `[q, n]` orthonormal, of a base that is not at hand.

    They are products of factors and no differences of weights, so nothing in them is the rounding of weights. What is
    held is the factors, and one core `[p, q]` while it is in use.

    Args:
        experts: with cores of one shape, dtype and device. Those of weight 0 or without an update are left out.
        coordinates: of the matrices that these are the cores of.
        name: as in `TaskVectors`.
        base_norm: as in `TaskVectors`.
        depth: as in `TaskVectors`.

    Raises:
        ValueError: when factors hold NaN or infinity, a weight is negative or not finite, or no weight is positive.
        RuntimeError: the process runs float32 products in reduced precision, and every method takes products of these.
    """

    experts: tuple[CoreExpert, ...]

    def __init__(
        self,
        experts: Sequence[CoreExpert],
        *,
        coordinates: Coordinates,
        name: str = "the matrix",
        base_norm: float | None = None,
        depth: int | None = None,
    ) -> None:
        device = experts[0].core.left.device
        require_full_float32(device)
        candidates = voting_experts(experts, name=name)
        statistics = [_statistics(expert, coordinates, name) for expert in candidates]
        super().__init__(
            experts,
            candidates,
            statistics,
            [None if measured.energy > 0 else "equal to the base here" for measured in statistics],
            name=name,
            depth=depth,
            dtype=experts[0].core.left.dtype,
            device=device,
        )
        self.coordinates: Coordinates = coordinates
        self.base_norm = base_norm
        self._buffer_shape = experts[0].core.shape
        self.energy_of_mean = squared_norm(self.sum()) / len(self) ** 2 if self.experts else 0.0

    @property
    def shape(self) -> tuple[int, int]:
        """`(m, n)`, of the matrices."""
        return self.coordinates.shape

    @property
    def buffer_shape(self) -> tuple[int, int]:
        """`(p, q)`."""
        return self._buffer_shape

    @property
    def rounding(self) -> float:
        """0."""
        return 0.0

    @property
    def output_rounding(self) -> float:
        """0."""
        return 0.0

    def rounding_energies(self) -> list[float]:
        """0 for each."""
        return [0.0] * len(self)

    def task_vector(self, t: int, *, out: Tensor | None = None) -> Tensor:
        """As `TaskVectors.task_vector`."""
        core = self.experts[t].core
        return core.matrix() if out is None else torch.matmul(core.left, core.right, out=out)

    def rows(self, t: int, rows: slice) -> Tensor:
        """As `TaskVectors.rows`."""
        return self.experts[t].core.rows(rows)

    def apart(self, t: int, reference: int, rows: slice) -> Tensor:
        """As `TaskVectors.apart`."""
        return self.rows(t, rows).sub_(self.rows(reference, rows))

    def row_panels(self) -> list[slice]:
        """As `TaskVectors.row_panels`."""
        return row_slices(*self.buffer_shape)

    def gram(self, t: int, *, rough: bool = False) -> Tensor:
        """As `TaskVectors.gram`: of the `r` rows that are left when the left factor is made orthonormal."""
        core = self.experts[t].core
        rows = torch.linalg.qr(core.left).R @ core.right
        return gram(rows.bfloat16()).to(self.dtype) if rough else gram(rows)

    def add_apart_times_(self, target: Tensor, t: int, reference: int, matrix: Tensor) -> Tensor:
        """As `TaskVectors.add_apart_times_`, by way of the few rows of the right factors."""
        for expert, sign in ((self.experts[t], 1.0), (self.experts[reference], -1.0)):
            target.addmm_(expert.core.left, expert.core.right @ matrix, alpha=sign)
        return target

    def singular_triples(self, t: int, k: int, *, floor: float = 0.0) -> SingularTriples:
        """As `TaskVectors.singular_triples`, by the factors."""
        return singular_triples_of_product(self.experts[t].core, k, floor=floor)

    def top_energies(self, experts: Sequence[int], directions: int) -> list[float]:
        """As `TaskVectors.top_energies`, by the factors."""
        return [float(self.singular_triples(t, directions).singular_values.square().sum()) for t in experts]

    def sum(self) -> Tensor:
        """As `TaskVectors.sum`, without a core of its own for each."""
        return weighted_sum([expert.core for expert in self.experts], self.shares)

    def _are_copies(self, s: int, t: int) -> bool:
        return self.experts[s].core.is_copy_of(self.experts[t].core)

    def _divide(self, unit: float) -> None:
        self.experts = tuple(
            replace(expert, core=Factors(left=expert.core.left / unit, right=expert.core.right))
            for expert in self.experts
        )


def _statistics(expert: CoreExpert, coordinates: Coordinates, name: str) -> UpdateStatistics:
    """`||L R||^2 = <L^T L, R R^T>`, and of the mean row by the coordinates of the column of ones."""
    of_left, of_right = expert.core.small_grams()
    along = coordinates.ones_left.double() @ expert.core.left.double()
    energy, of_means = torch.stack([(of_left * of_right).sum(), along @ of_right @ along]).tolist()
    require_finite_factors(energy, expert.core.left.dtype, expert.name, name=name)
    return statistics_of(max(0.0, energy), of_means / coordinates.shape[0])
