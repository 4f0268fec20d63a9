"""What a user should act on, said once a cause and not once a layer."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator

from mergekit_ace.linalg.precision import squared_norm
from mergekit_ace.matrix.merge import MatrixMerge

LOG = logging.getLogger("mergekit_ace")

# The ridge is so many times the mean eigenvalue of what it regularizes: an average but for a few percent.
_DROWNED = 10.0
# The refinement alone is this many times as long as the longest of the experts' updates.
_DOMINATES = 3.0
LARGE = 0.2
"""The merge changes a weight by this share of its norm: what the experts learned adds up only where changes are small,
and models whose layers changed by more lost accuracy (README)."""


def causes(layer: MatrixMerge, longest_update: float, *, weight_norm: float, scale: float) -> Iterator[tuple[str, str]]:
    """What is wrong with a layer's merge, as (cause, message without the layer's name).

    Args:
        layer: the merge.
        longest_update: largest `||D_t||_F` of its experts.
        weight_norm: `||.||_F` of the base's weight.
        scale: `lambda`.
    """
    change = abs(scale) * squared_norm(layer.task_vector) ** 0.5
    if 0 < LARGE * weight_norm < change:
        yield (
            "large",
            f"the merge changes it by {change / weight_norm:.0%} of its norm, and updates this large do not add up. "
            "Set a smaller lambda, or length_bound: true with ace",
        )
    # An estimated ridge is large where the second moments themselves say nothing.
    if layer.ridge is not None and layer.ridge_is_fixed and layer.ridge > _DROWNED:
        yield (
            "ridge",
            f"epsilon is {layer.ridge:.2g} times the mean eigenvalue of the second moments and drowns them: the layer "
            "is all but averaged. Set epsilon: auto, or a smaller one",
        )
    if layer.averaged == 1:
        yield (
            "correlation",
            f"the experts' second moments correlate by {layer.correlation:.2g} only and say nothing of the inputs, as "
            "with adapters whose input matrix is their random start; the layer is averaged. "
            "Set correlation_threshold: 0 to merge it by them all the same",
        )
    if layer.refinement is not None and layer.refinement.norm > _DOMINATES * longest_update:
        yield (
            "refinement",
            f"spectral refinement adds {layer.refinement.norm / longest_update:.2g} times the longest expert's update. "
            "Raise heterogeneity_threshold or set spectral_fraction: 0",
        )


class OnceEach:
    """Logs the first message of each cause; thread-safe, one for each merge method."""

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._lock = threading.Lock()

    def warn(self, cause: str, message: str) -> None:
        """Warn, unless a message of the same cause was logged before."""
        with self._lock:
            if cause in self._said:
                return
            self._said.add(cause)
        LOG.warning("%s. Said once; -v shows every layer.", message)
