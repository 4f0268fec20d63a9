"""What a layer's task vectors decide before anything is solved."""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_ace.layer.adapters import LEAST_SHRINKAGE, are_low_rank
from mergekit_ace.layer.heterogeneity import heterogeneity
from mergekit_ace.layer.options import CovarianceOptions
from mergekit_ace.layer.task_vectors import TaskVectors


@dataclass(frozen=True, kw_only=True)
class Branch:
    """The way that one layer's merge takes."""

    heterogeneity: float
    """The statistic."""
    heterogeneous: bool
    """What the gate said of it."""
    normalize: bool
    """Each second moment is divided by its trace."""
    refine: bool
    """The spectrum is refined."""
    with_residual: bool
    """It is refined of the residual too, which the solve then has to give."""
    low_rank: bool | None
    """The updates are of low rank; None where no option asks for it."""

    @property
    def least_shrinkage(self) -> float:
        """Smallest share of the identity in an estimated ridge."""
        return LEAST_SHRINKAGE if self.low_rank else 0.0


def choose_branch(task_vectors: TaskVectors, options: CovarianceOptions) -> Branch:
    """Gate the layer (ACE, arXiv:2603.02945, Eqs. 8-10 and 15-19), from norms alone but for the rank.

    Args:
        task_vectors: of at least one expert.
        options: when to normalize and to refine, and whether the rank matters.
    """
    spread = heterogeneity(task_vectors.energies, options.heterogeneity)
    heterogeneous = options.is_heterogeneous(spread)
    happens = {"never": False, "heterogeneous": heterogeneous, "always": True}
    refine = happens[options.refinement] and int(options.spectral_fraction * min(task_vectors.shape)) > 0
    return Branch(
        heterogeneity=spread,
        heterogeneous=heterogeneous,
        normalize=happens[options.trace_normalization],
        refine=refine,
        with_residual=refine and options.refined == "residual",
        low_rank=are_low_rank(task_vectors) if options.asks_for_rank else None,
    )
