"""How unlike the experts' updates are in one layer: the gate of trace normalization and spectral refinement."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Literal

HeterogeneityStatistic = Literal["published", "scale_free"]


def heterogeneity(energies: Sequence[float], statistic: HeterogeneityStatistic) -> float:
    """Spread of the experts' update energies in a layer.

    Args:
        energies: `e_t = ||D_t||_F^2`, all positive, of at least one expert.
        statistic: `published` or `scale_free`.

    Returns:
        The statistic, `>= 0`; 0 for a single expert.
    """
    if len(energies) < 2:
        return 0.0
    logarithms = [math.log(energy) for energy in energies]
    variance = statistics.variance(logarithms)
    if statistic == "scale_free":
        return variance
    mean = statistics.fmean(logarithms)
    if variance == 0.0:
        return 0.0
    return variance / mean**2 if mean != 0.0 else math.inf
