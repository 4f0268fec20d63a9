"""What goes wrong in a merge is said, once, with its cause and its remedy; what goes well is not talked about."""

import logging

import pytest
import torch
from mergekit.merge_methods.api import merge_state_dicts
from torch import Tensor

import mergekit_ace
from mergekit_ace.matrix.merge import MatrixMerge
from mergekit_ace.matrix.refinement import Refinement
from mergekit_ace.methods.advice import OnceEach, causes
from tests.matrix.experts import adapter_updates, related_updates

NAME = "model.layers.0.mlp.up_proj.weight"


def said(caplog: pytest.LogCaptureFixture, updates: list[Tensor], change: float, **parameters: object) -> list[str]:
    """The warnings of a merge of two like layers, the updates being `change` times the norm of the base."""
    base = torch.randn(updates[0].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale = change * base.norm() / torch.stack([update.norm() for update in updates]).mean()
    models = {"base": {NAME: base, NAME.replace("0", "1"): base}}
    for t, update in enumerate(updates):
        weight = base + scale * update
        models[f"expert {t}"] = {NAME: weight, NAME.replace("0", "1"): weight}
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="mergekit_ace"):
        merge_state_dicts(models, "ace", base="base", parameters=parameters)
    return [record.getMessage() for record in caplog.records if record.name == "mergekit_ace"]


@pytest.fixture(autouse=True)
def _afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method says a thing once in the life of its process."""
    mergekit_ace.register()
    (ace,) = (method for method in mergekit_ace.METHODS if method.name == "ace")
    monkeypatch.setattr(ace, "_once", OnceEach())


def test_small_updates_of_one_covariance_are_merged_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    assert said(caplog, related_updates(40, 30, 3), 0.01) == []


@pytest.mark.parametrize(
    ("updates", "change", "parameters", "words"),
    [
        (related_updates(40, 30, 3), 0.3, {}, "of its norm, and updates this large do not add up"),
        (related_updates(40, 30, 3), 0.01, {"preset": "published", "epsilon": 1e6}, "drowns them"),
        (adapter_updates(60, 80, 3, rank=3), 0.01, {}, "second moments correlate by"),
    ],
)
def test_a_cause_is_named_once_with_a_remedy(
    updates: list[Tensor],
    change: float,
    parameters: dict[str, object],
    words: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (message,) = said(caplog, updates, change, **parameters)
    assert message.startswith(NAME)
    assert words in message
    assert "Set " in message


@pytest.mark.parametrize(("length_bound", "most"), [("auto", 400), (True, 100)])
def test_the_remedy_for_large_updates_helps(length_bound: object, most: int, caplog: pytest.LogCaptureFixture) -> None:
    # four independent updates, each half as long as the base
    (message,) = said(caplog, related_updates(20, 90, 4), 0.5, length_bound=length_bound)
    percent = int(message.split("%")[0].split()[-1])
    assert most / 2 < percent <= most


def test_a_refinement_that_dominates_is_named() -> None:
    update = torch.eye(4)
    refinement = Refinement(directions=1, level=8.0, norm=8.0, update=update)
    layer = MatrixMerge(task_vector=update, refinement=refinement)
    ((cause, message),) = causes(layer, 2.0, weight_norm=100.0, scale=1.0)
    assert cause == "refinement"
    assert "4 times the longest expert's update" in message
    assert list(causes(layer, 4.0, weight_norm=100.0, scale=1.0)) == []


def test_a_base_of_zeros_has_no_norm_to_compare_with() -> None:
    assert list(causes(MatrixMerge(task_vector=torch.eye(4)), 1.0, weight_norm=0.0, scale=1.0)) == []
