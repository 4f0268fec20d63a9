"""A full merge of `base+adapter` takes the factors from the adapters' files, whatever mergekit rounded them to."""

import logging
import math
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from mergekit_ace import merge_adapters
from mergekit_ace.factors.opening import open_adapter
from tests.adapters.makers import updates_of
from tests.checkpoints import Suite, add_adapter, make_suite, read_tensors
from tests.commands import mergekit_yaml

TARGETS = (["q_proj", "up_proj"], ["q_proj", "v_proj"], ["q_proj", "up_proj"])


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    return make_suite("llama", tmp_path_factory.mktemp("suite"), experts=1)


@pytest.fixture(scope="module")
def adapters(suite: Suite, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [
        add_adapter(suite.base.path, folder / f"a{t}", rank=2 + t, targets=targets, seed=t, scale=0.1)
        for t, targets in enumerate(TARGETS)
    ]


def merged_by_yaml(suite: Suite, adapters: list[Path], out: Path, dtype: str, **entries: object) -> dict[str, Tensor]:
    base = str(suite.base.path)
    document = {
        "merge_method": "ace",
        "base_model": base,
        "dtype": "float32",
        "models": [{"model": f"{base}+{folder}"} for folder in adapters],
        **entries,
    }
    flags = ("--lora-merge-dtype", dtype, "--lora-merge-cache", str(out.with_name(f"{out.name}-cache")), "-v")
    return read_tensors(mergekit_yaml(yaml.safe_dump(document), out, *flags))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_update_is_that_of_the_factors(
    suite: Suite, adapters: list[Path], dtype: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="mergekit_ace"):
        full = merged_by_yaml(suite, adapters, tmp_path / "out", dtype)
    alone = merge_adapters(adapters, base=str(suite.base.path), out=tmp_path / "adapter")
    updates = updates_of(open_adapter(tmp_path / "adapter"))
    assert {weight.name for weight in alone.report.weights} == set(updates)
    base = suite.base.tensors
    for name, update in updates.items():
        # One rounding of the sum to float32, and bfloat16 of the adapters' merge nowhere.
        torch.testing.assert_close(full[name] - base[name], update, atol=1e-5, rtol=1e-3)
    noted = [record.getMessage() for record in caplog.records]
    assert any("model.layers.0.self_attn.q_proj.weight" in line and "by factors" in line for line in noted)
    assert any("only" in line and "by its factors" in line for line in noted)


def test_a_tensor_that_was_changed_on_the_way_counts_as_it_is(
    suite: Suite, adapters: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Layers stacked in another order: layer 0 of the output is made of layer 2 of the experts."""
    base = str(suite.base.path)
    sources = [base, *(f"{base}+{folder}" for folder in adapters)]
    slices = [
        {"sources": [{"model": model, "layer_range": [start, start + 1]} for model in sources]} for start in (2, 1, 0)
    ]
    with caplog.at_level(logging.INFO, logger="mergekit_ace"):
        turned = merged_by_yaml(suite, adapters, tmp_path / "turned", "float32", models=None, slices=slices)
    noted = [record.getMessage() for record in caplog.records]
    name = "model.layers.{}.self_attn.q_proj.weight"
    assert any(line.startswith(name.format(0)) and "is taken from the tensor" in line for line in noted)
    straight = merged_by_yaml(suite, adapters, tmp_path / "straight", "float32")
    for number in range(3):
        ours, theirs = turned[name.format(2 - number)], straight[name.format(number)]
        change = float((theirs - suite.base.tensors[name.format(number)]).norm())
        assert float((ours - theirs).norm()) < 1e-3 * change
        assert math.isfinite(change)
        assert change > 0.1
