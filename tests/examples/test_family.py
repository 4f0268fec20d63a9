"""The recipes of the methods that `ace` is compared with."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.checkpoints import make_suite, read_tensors
from tests.commands import mergekit_yaml
from tests.end_to_end.comparison import assert_one_rounding, reference_for
from tests.examples.stand_ins import localized
from tests.reference import actmat, cart, iso_c, iso_cts, merge_tensor, tsv_m, wudi_closed_form
from tests.reference.tensors import TaskVectorMerge
from tests.zoo.forward import load_and_run

EPSILON = 0.01
Vectors, Weights = Sequence[Tensor], Sequence[float] | None


def _actmat(task_vectors: Vectors, weights: Weights, dtype: torch.dtype, base: Tensor) -> Tensor:
    return actmat(task_vectors, EPSILON, weights, dtype)


def _wudi(task_vectors: Vectors, weights: Weights, dtype: torch.dtype, base: Tensor) -> Tensor:
    """The ridge is divided by the squared norm, as the second moment is."""
    ridges = [EPSILON / float(d.square().sum()) for d in task_vectors if d.any()]
    return wudi_closed_form(task_vectors, ridges, weights, dtype)


def _tsv_m(task_vectors: Vectors, weights: Weights, dtype: torch.dtype, base: Tensor) -> Tensor:
    return tsv_m(task_vectors, weights, dtype)


def _iso_c(task_vectors: Vectors, weights: Weights, dtype: torch.dtype, base: Tensor) -> Tensor:
    return iso_c(task_vectors, weights, dtype)


def _iso_cts(task_vectors: Vectors, weights: Weights, dtype: torch.dtype, base: Tensor) -> Tensor:
    return iso_cts(task_vectors, 0.8, weights, dtype)


def _cart(task_vectors: Vectors, weights: Weights, dtype: torch.dtype, base: Tensor) -> Tensor:
    """The rank is a share of the layer's."""
    return cart(task_vectors, math.floor(0.08 * min(task_vectors[0].shape)), 1.0, weights, dtype)


@pytest.mark.parametrize(
    ("recipe", "literal"),
    [
        ("actmat", _actmat),
        ("wudi", _wudi),
        ("tsv-m", _tsv_m),
        ("iso-c", _iso_c),
        ("iso-cts", _iso_cts),
        ("cart", _cart),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_family(recipe: str, literal: TaskVectorMerge, tmp_path: Path) -> None:
    suite = make_suite("llama", tmp_path, dtype=torch.bfloat16)
    models = {"meta-llama/Llama-3.2-1B-Instruct": suite.base.path}
    for task, expert in zip(("code", "maths", "medicine"), suite.experts, strict=True):
        models[f"your-name/Llama-3.2-1B-{task}"] = expert.path
    (document,) = localized(recipe, models, {"epsilon": EPSILON})
    out = mergekit_yaml(document, tmp_path / "out")
    for name, tensor in read_tensors(out).items():
        base, *experts = (checkpoint.tensors[name] for checkpoint in (suite.base, *suite.experts))

        assert_one_rounding(name, tensor, merge_tensor(name, base, experts, reference_for(suite.family), merge=literal))
    load_and_run(suite.family, out)
