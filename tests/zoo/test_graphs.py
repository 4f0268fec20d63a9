"""`mergekit-multi`: ACE at the start, in the middle and at the end of a chain of merges."""

from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.merge_methods.api import merge_tensors
from torch import Tensor

from tests.checkpoints import Suite, make_suite, read_tensors
from tests.checkpoints.suite import Checkpoint
from tests.commands import mergekit_multi
from tests.end_to_end.comparison import PUBLISHED, assert_merged, reference_for
from tests.zoo.forward import load_and_run

Document = dict[str, Any]


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    return make_suite("llama", tmp_path, experts=4)


def ace_of(base: str, *experts: str) -> Document:
    models = [{"model": expert} for expert in experts]
    return {"merge_method": "ace", "base_model": base, "models": models, "parameters": PUBLISHED, "dtype": "float64"}


def average_of(*models: str) -> Document:
    parts = [{"model": model, "parameters": {"weight": 1.0}} for model in models]
    return {"merge_method": "linear", "models": parts, "dtype": "float64"}


def average(*tensors: Tensor) -> Tensor:
    return merge_tensors([t.double() for t in tensors], "linear", parameters={"weight": [1.0] * len(tensors)})


def stage(tmp_path: Path, name: str) -> Checkpoint:
    path = tmp_path / "out-between" / name
    return Checkpoint(path, read_tensors(path))


def test_ace_at_the_start_and_at_the_end(suite: Suite, tmp_path: Path) -> None:
    """Two pairs merged by ACE, then the two results merged by ACE on the same base."""
    base, *experts = (str(c.path) for c in (suite.base, *suite.experts))
    documents = [
        {"name": "left", **ace_of(base, *experts[:2])},
        {"name": "right", **ace_of(base, *experts[2:])},
        ace_of(base, "left", "right"),
    ]
    out = mergekit_multi(documents, tmp_path / "out")
    reference = reference_for(suite.family)
    left, right = stage(tmp_path, "left"), stage(tmp_path, "right")
    assert_merged(left.tensors, suite.base, suite.experts[:2], reference, torch.float64)
    assert_merged(right.tensors, suite.base, suite.experts[2:], reference, torch.float64)
    assert_merged(read_tensors(out), suite.base, [left, right], reference, torch.float64)
    load_and_run(suite.family, out)


def test_ace_in_the_middle(suite: Suite, tmp_path: Path) -> None:
    """An average makes one of ACE's experts; another average takes ACE's result."""
    base, *experts = (str(c.path) for c in (suite.base, *suite.experts))
    documents = [
        {"name": "pair", **average_of(*experts[:2])},
        {"name": "merged", **ace_of(base, "pair", experts[2])},
        average_of("merged", experts[3]),
    ]
    out = read_tensors(mergekit_multi(documents, tmp_path / "out"))
    pair, merged = stage(tmp_path, "pair"), stage(tmp_path, "merged")
    assert_merged(merged.tensors, suite.base, [pair, suite.experts[2]], reference_for(suite.family), torch.float64)
    for name, tensor in out.items():
        torch.testing.assert_close(tensor, average(merged.tensors[name], suite.experts[3].tensors[name]))


def test_an_intermediate_merge_as_the_base(suite: Suite, tmp_path: Path) -> None:
    """The base of ACE may be a merge itself; the experts' task vectors are taken from it."""
    base, *experts = (str(c.path) for c in (suite.base, *suite.experts))
    documents = [{"name": "start", **average_of(base, experts[0])}, ace_of("start", *experts[1:])]
    out = read_tensors(mergekit_multi(documents, tmp_path / "out"))
    assert_merged(out, stage(tmp_path, "start"), suite.experts[1:], reference_for(suite.family), torch.float64)
