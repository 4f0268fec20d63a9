"""`merge_method: ace` with no parameters at all, held against its own literal reference."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from tests.checkpoints import make_suite, read_tensors
from tests.commands import mergekit_yaml
from tests.end_to_end.comparison import (
    FLOAT32_FLOOR,
    FLOAT64_TOLERANCE,
    assert_one_rounding,
    recipe_for,
    reference_for,
    task_vector_error,
)
from tests.reference import ace_default, merge_tensor
from tests.zoo.forward import load_and_run

# Of the merged task vector: the shrunk systems are well conditioned, so that roundings do not grow by more than this.
FLOAT32_TOLERANCE = 20 * FLOAT32_FLOOR


# Output heads, and tables that these are tied to: merged by the default as linear maps, without refinement.
HEADS = {
    "llama": ["lm_head.weight"],
    "llama-tied": ["model.embed_tokens.weight"],
    "gpt2": ["transformer.wte.weight"],
    "mixtral": ["lm_head.weight"],
    "roberta": [],
}


def merged_by_default(
    task_vectors: Sequence[Tensor],
    weights: Sequence[float] | None,
    dtype: torch.dtype,
    base: Tensor,
    *,
    depth: int,
    head: bool,
) -> Tensor:
    return ace_default(task_vectors, weights, dtype, base_norm=float(base.norm()), depth=depth, head=head)


@pytest.mark.parametrize("family", HEADS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_default(family: str, dtype: str, tmp_path: Path) -> None:
    suite = make_suite(family, tmp_path, scale=0.1)
    recipe = {**recipe_for(suite, weights=(2.0, 1.0, 0.5)), "dtype": dtype}
    del recipe["parameters"]
    out = mergekit_yaml(recipe, tmp_path / "out")
    reference = reference_for(suite.family, weights=(2.0, 1.0, 0.5))
    merged = read_tensors(out)
    config = AutoConfig.from_pretrained(suite.base.path)
    assert config.num_hidden_layers < 32  # which it would count as, were it not read
    assert merged.keys() >= set(HEADS[family])
    for name, tensor in merged.items():
        base, *experts = (c.tensors[name].to(getattr(torch, dtype)) for c in (suite.base, *suite.experts))
        head = name in HEADS[family]
        expected = replace(reference, embeddings="ace" if head else "average")
        merge = partial(merged_by_default, depth=config.num_hidden_layers, head=head)
        exact = merge_tensor(name, base, experts, expected, merge=merge)
        if torch.equal(exact, base.double()):
            assert torch.equal(tensor, base), name
        elif dtype == "bfloat16":
            assert_one_rounding(name, tensor, exact)
        else:
            tolerance = FLOAT64_TOLERANCE if dtype == "float64" else FLOAT32_TOLERANCE
            assert task_vector_error(tensor, base, exact) <= tolerance, name
    if dtype != "float64":
        load_and_run(suite.family, out)
