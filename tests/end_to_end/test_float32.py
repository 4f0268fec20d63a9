"""Float32 merges are at least as exact as the literal steps in float32."""

import itertools
import math

import pytest
import torch
from mergekit.merge_methods.api import merge_tensors
from torch import Tensor

import mergekit_ace
from tests.end_to_end.comparison import PUBLISHED, task_vector_error
from tests.reference import AceOptions, Recipe, merge_tensor

mergekit_ace.register()

SHAPES = ((256, 256), (512, 128), (128, 512))
COUNTS = (3, 8)
# The ridge decides the conditioning of the system: errors of 1e-6 at the first, 1e-4 at the second.
RIDGES = (1e-2, 1e-5)
# The sums are taken in another order than the literal one, so that either may be luckier in a single layer.
SINGLE_LAYER = 1.5


def layer(m: int, n: int, count: int) -> list[Tensor]:
    """A base and experts with a dominant subspace of 24 directions each, as real updates have."""
    generator = torch.Generator().manual_seed(m + n + count)
    base = 0.02 * torch.randn(m, n, generator=generator)
    experts = []
    for t in range(count):
        left, right = torch.randn(m, 24, generator=generator), torch.randn(24, n, generator=generator)
        experts.append(base + 6e-4 * (t + 1) * left @ right + 1e-3 * torch.randn(m, n, generator=generator))
    return [base, *experts]


@pytest.mark.parametrize("threshold", [math.inf, 0.0], ids=["homogeneous", "heterogeneous"])
def test_no_worse_than_the_literal_steps(threshold: float) -> None:
    ratios = {}
    for (m, n), count, epsilon in itertools.product(SHAPES, COUNTS, RIDGES):
        base, *experts = tensors = layer(m, n, count)
        options = {"epsilon": epsilon, "heterogeneity_threshold": threshold}
        recipe = Recipe(options=AceOptions(**options))
        exact = merge_tensor("weight", base, experts, recipe)
        literal = merge_tensor("weight", base, experts, recipe, torch.float32)
        merged = merge_tensors(tensors, "ace", base_index=0, name="weight", parameters={**PUBLISHED, **options})
        error, allowed = (task_vector_error(result, base, exact) for result in (merged, literal))
        assert error < 1e-3
        ratios[m, n, count, epsilon] = error / allowed
    assert max(ratios.values()) <= SINGLE_LAYER, ratios
    assert math.exp(sum(map(math.log, ratios.values())) / len(ratios)) <= 1, ratios
