"""Combinations of adapters as peft wrote them, on a suite of seconds."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.experiment.combinations import combine
from benchmarks.experiment.contenders import robust_factors
from benchmarks.experiment.settings import SETTINGS, Setting, combination
from benchmarks.suites.decoder import Decoder
from benchmarks.suites.form import build
from benchmarks.suites.recipe import ADAPTERS, Expert, Suite
from tests.benchmarks.test_suites import shorten

TASKS = ["sums", "rot13"]
WEIGHT = "model.layers.1.mlp.up_proj.weight"
MODULE = f"base_model.model.{WEIGHT.removesuffix('.weight')}"
# float32 rounding of products added to weights of about 1e-1, against updates of about 1e-3
ROUNDING = 1e-5
Factors = tuple[torch.Tensor, torch.Tensor]


def built(root: Path, ranks: tuple[int, int]) -> Path:
    experts = tuple(
        Expert(task=task, steps=3, learning_rate=2e-2, lora_rank=rank, seed=rank)
        for task, rank in zip(TASKS, ranks, strict=True)
    )
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        build(Decoder(), Suite(name="adapters", kind="decoder", experts=experts), root)
    return root


@pytest.fixture(scope="module")
def equal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("equal"), (2, 2))


@pytest.fixture(scope="module")
def unequal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("unequal"), (2, 4))


def factors(root: Path, task: str) -> Factors:
    """A, and B times the scaling, which is alpha over rank and two in every recipe."""
    stored = load_file(root / ADAPTERS / task / "adapter_model.safetensors")
    return stored[f"{MODULE}.lora_A.weight"], 2 * stored[f"{MODULE}.lora_B.weight"]


def update(root: Path, folder: Path) -> torch.Tensor:
    """Of one weight, to the base."""
    weights, base = load_file(folder / "model.safetensors"), load_file(root / "base" / "model.safetensors")
    assert weights.keys() == base.keys()
    return weights[WEIGHT] - base[WEIGHT]


def combined(root: Path, folder: Path, setting: Setting) -> torch.Tensor:
    assert combine(setting, root, TASKS, folder) > 0
    return update(root, folder)


def test_the_adapters_of_a_suite_are_what_its_experts_have_merged_in(unequal: Path) -> None:
    for task in TASKS:
        A, B = factors(unequal, task)
        torch.testing.assert_close(update(unequal, unequal / task), B @ A, atol=ROUNDING, rtol=0)
        assert (B @ A).abs().max() > 100 * ROUNDING


@pytest.mark.parametrize(("weight", "each"), [({}, 0.5), ({"weight": 1.0}, 1.0)])
def test_cat_is_the_weighted_sum_of_the_updates(
    unequal: Path, tmp_path: Path, weight: dict[str, float], each: float
) -> None:
    expected = each * sum(B @ A for A, B in (factors(unequal, task) for task in TASKS))
    found = combined(unequal, tmp_path, combination("cat", "cat", **weight))
    torch.testing.assert_close(found, expected, atol=ROUNDING, rtol=0)


def test_linear_joins_the_factors_apart(equal: Path, tmp_path: Path) -> None:
    # With weights 1 / 2 on updates peft multiplies each factor by their root, and its product has all four terms.
    (first_A, first_B), (second_A, second_B) = (factors(equal, task) for task in TASKS)
    expected = 0.5 * (first_B + second_B) @ (first_A + second_A)
    found = combined(equal, tmp_path, combination("linear", "linear"))
    torch.testing.assert_close(found, expected, atol=ROUNDING, rtol=0)


def test_robust_merge_is_its_formula_on_the_adapters_factors(equal: Path, tmp_path: Path) -> None:
    A, B = zip(*(factors(equal, task) for task in TASKS), strict=True)
    down, up = robust_factors(A, B)
    found = combined(equal, tmp_path, combination("robust", "robust_merge"))
    torch.testing.assert_close(found, up @ down, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("kind", ["linear", "ties", "dare_ties", "robust_merge"])
def test_what_joins_the_factors_refuses_unequal_ranks(unequal: Path, tmp_path: Path, kind: str) -> None:
    parameters = {"density": 0.5} if kind.endswith("ties") else {}
    with pytest.raises(ValueError, match="same r value"):
        combine(combination(kind, kind, **parameters), unequal, TASKS, tmp_path)


@pytest.mark.parametrize("setting", [s for s in SETTINGS if s.of_adapters], ids=lambda setting: setting.label)
def test_every_combination_gives_a_finite_model(equal: Path, tmp_path: Path, setting: Setting) -> None:
    found = combined(equal, tmp_path, setting)
    assert found.isfinite().all()
    assert found.count_nonzero()
