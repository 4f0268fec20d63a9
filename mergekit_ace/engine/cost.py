"""Seconds of a tensor's merge relative to others', for the order of work and the time that is left."""

from __future__ import annotations

from mergekit_ace.recipe.tensor_cost import TensorCost

# A machine of no particular kind, where only the ratios matter. Measured on one core with AVX-512: a multiply-add in
# float64 takes 1.9 times one in float32, a float64 eigendecomposition 10.5 float32 multiply-adds over its size cubed.
_MULTIPLY_ADDS_A_SECOND = 5e10
_DOUBLE = 1.9
_EIGENDECOMPOSITION = 10.5
_BYTES_A_SECOND = 1e9


def seconds(cost: TensorCost) -> float:
    """Reading, writing and arithmetic."""
    count = cost.arithmetic
    arithmetic = count.single + _DOUBLE * count.double + _EIGENDECOMPOSITION * count.cubes
    return (cost.read + cost.written) / _BYTES_A_SECOND + arithmetic / _MULTIPLY_ADDS_A_SECOND
