"""Float32 merges are at least as exact as the literal steps in float32."""

import math
from pathlib import Path

import pytest
import torch

from tests.checkpoints import Update, make_suite, read_tensors
from tests.commands import mergekit_yaml
from tests.end_to_end.comparison import recipe_for, reference_for, task_vector_error
from tests.reference import AceOptions, merge_tensor

# The ridge decides the conditioning of the system: from about 1e2 to about 1e6 here.
RIDGES = (1e-2, 1e-4, 1e-6)
# Of the geometric mean: either side is made of roundings, and which falls luckier differs from layer to layer.
NO_WORSE = 1.15


@pytest.mark.parametrize("epsilon", RIDGES)
@pytest.mark.parametrize("update", [Update.EVEN, Update.UNEVEN], ids=["homogeneous", "heterogeneous"])
def test_no_worse_than_the_literal_steps(update: Update, epsilon: float, tmp_path: Path) -> None:
    suite = make_suite("llama", tmp_path, update=update)
    merged = read_tensors(mergekit_yaml(recipe_for(suite, epsilon=epsilon), tmp_path / "out"))
    recipe = reference_for(suite.family, options=AceOptions(epsilon=epsilon))
    ratios = []
    for name, tensor in merged.items():
        base, *experts = (checkpoint.tensors[name] for checkpoint in (suite.base, *suite.experts))
        if recipe.treatment(name, base) == "ace":
            exact = merge_tensor(name, base, experts, recipe)
            literal = merge_tensor(name, base, experts, recipe, torch.float32)
            ratios.append(task_vector_error(tensor, base, exact) / task_vector_error(literal, base, exact))
    assert len(ratios) == 21
    assert math.exp(sum(map(math.log, ratios)) / len(ratios)) <= NO_WORSE
