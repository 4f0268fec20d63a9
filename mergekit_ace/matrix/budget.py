"""How wrong the merged weights may be before they are rounded to 16 bits."""

from __future__ import annotations

import math

from mergekit_ace.matrix.options import Precision
from mergekit_ace.matrix.task_vectors import TaskVectors

SHARE_OF_ROUNDING = 1 / 8
"""Of `||storage(W) - W||_F`, the error that rounding the merged weights `W` adds in any case.

Errors that do not depend on each other add up by their squares: an eighth makes the whole error larger by less than one
percent.
"""


# Shares of the error that is allowed: of the products, with what refinement makes of their error, and of the
# refinement's own products and eigenvectors. Their squares add up to one.
PRODUCTS, REFINEMENT = 0.9, math.sqrt(1 - 0.9**2)
# An error of the products with what refinement makes of it, over that error: 2 to 3.5 on layers of language models. It
# is estimated once the spectrum is known; where it is more than was allowed, as on one steep spectrum of nine, the
# merge is done once more in full precision, which must stay rare.
FOLLOWING = 3.0


def error_budget(task_vectors: TaskVectors, precision: Precision) -> float:
    """Largest `||.||_F` of the error of the merged weights before they are rounded; 0: no more than needed.

    An eighth of `1 / sqrt(1 / r^2 + 1 / ||M||^2)`, with `r` the error of rounding numbers as large as the weights, and
    `M` the mean of the updates, which merges are longer than: the base is on the grid already, so that rounding a
    smaller update than its steps costs no more than that update.

    Args:
        task_vectors: whose base has the dtype that the merged weights are rounded to.
        precision: `full`: 0.
    """
    rounding = 0.0 if precision == "full" else task_vectors.output_rounding
    length = math.sqrt(task_vectors.energy_of_mean)
    if rounding == 0 or length == 0:
        return 0.0
    return SHARE_OF_ROUNDING * rounding * length / math.hypot(rounding, length)
