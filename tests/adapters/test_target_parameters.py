"""Parameters of one module, such as stacked experts: peft's keys nest them, and do not name them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from mergekit_ace import merge_adapters
from mergekit_ace.factors.opening import adapter_from_tensors, open_adapter
from mergekit_ace.factors.tensors import AdapterError
from tests.adapters.makers import adapted, merged_weights, mixture, saved, updates_of

# peft's own, on patterns of parameters: it looks for them among the names of modules alone.
pytestmark = pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match any targeted module")

GATES, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
# Differences of float32 weights of size 1.
_TOLERANCE = 5e-6


class Declared(nn.Module):
    """Two parameters of the same shape: only their order in the base tells them apart."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.zeros(3, 4, 4))
        self.w2 = nn.Parameter(torch.zeros(3, 4, 4))


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Declared()


def config(*parameters: str, r: int = 2, **options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=r, lora_alpha=5, target_modules=[], target_parameters=list(parameters), **options)


def added(base: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    before, after = base.state_dict(), merged_weights(model)
    return {name: after[name] - tensor for name, tensor in before.items() if not torch.equal(after[name], tensor)}


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, update in expected.items():
        torch.testing.assert_close(found[name], update, atol=_TOLERANCE, rtol=1e-4)


@pytest.mark.parametrize(
    "patterns",
    [
        {"alpha_pattern": {"experts.gate_up_proj": 11}},
        {"rank_pattern": {"experts.gate_up_proj": 4}},
        {"rank_pattern": {r"layers\.1\.mlp\.experts\.down_proj": 3}, "alpha_pattern": {"down_proj": 1}},
    ],
    ids=["alpha", "rank", "both"],
)
def test_patterns_of_one_parameter_are_of_it_alone(patterns: dict[str, Any], tmp_path: Path) -> None:
    base = mixture()
    model = adapted(base, config(DOWN, GATES, **patterns), seed=1)
    expected = added(base, model)
    assert_same(updates_of(open_adapter(saved(model, tmp_path / "a"))), expected)
    merge_adapters([tmp_path / "a"], out=tmp_path / "out")
    assert_same(added(mixture(), peft.PeftModel.from_pretrained(base, tmp_path / "out")), expected)


@pytest.mark.parametrize(
    "targets", [[(GATES,), (DOWN, GATES)], [(GATES,), (DOWN,)], [(DOWN,), (GATES, DOWN), (GATES,)]]
)
def test_adapters_of_different_parameters_are_one_adapter(targets: list[tuple[str, ...]], tmp_path: Path) -> None:
    """The key of one adapter's only parameter is that of another's outer one."""
    base, count = mixture(), len(targets)
    models = [adapted(base, config(*names, r=2 + t), seed=t) for t, names in enumerate(targets)]
    folders = [saved(model, tmp_path / f"a{t}") for t, model in enumerate(models)]
    merge_adapters(folders, parameters={"matrices": "average"}, out=tmp_path / "out")
    expected: dict[str, Tensor] = {}
    for model in models:
        for name, update in added(base, model).items():
            expected[name] = expected.get(name, torch.zeros_like(update)) + update / count
    assert_same(added(mixture(), peft.PeftModel.from_pretrained(base, tmp_path / "out")), expected)


def test_a_target_without_its_module_is_any_parameter_of_that_name(tmp_path: Path) -> None:
    base = mixture()
    model = adapted(
        base,
        peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["gate_up_proj"]),
        seed=1,
    )
    assert_same(updates_of(open_adapter(saved(model, tmp_path / "a"))), added(base, model))


def drawn(names: list[str], experts: int = 3, rank: int = 2) -> dict[str, Tensor]:
    keys = {f"base_model.model.{name}.lora_A.weight": (experts * rank, 4) for name in names}
    keys |= {f"base_model.model.{name}.lora_B.weight": (4, experts * rank) for name in names}
    return {
        key: torch.randn(shape, generator=torch.Generator().manual_seed(i))
        for i, (key, shape) in enumerate(keys.items())
    }


SETTINGS = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_parameters": ["inner.w1", "inner.w2"]}


def test_parameters_that_cannot_be_told_apart_keep_their_places() -> None:
    tensors = drawn(["inner.base_layer", "inner"])
    merged = merge_adapters([(tensors, SETTINGS), (tensors, SETTINGS)])
    assert merged.tensors.keys() == tensors.keys()
    model = peft.get_peft_model(Holder(), peft.LoraConfig(**merged.configuration))  # type: ignore[arg-type]
    assert not peft.set_peft_model_state_dict(model, merged.tensors).unexpected_keys
    whole = merge_adapters([(merged.tensors, merged.configuration)])
    assert {weight.rank for weight in whole.report.weights} == {4}


def test_parameters_that_cannot_be_told_apart_are_not_guessed() -> None:
    tensors = drawn(["inner.base_layer", "inner"])
    with pytest.raises(AdapterError, match=r"parameters of inner must have the same lora_alpha, .*w1, w2"):
        adapter_from_tensors(tensors, {**SETTINGS, "alpha_pattern": {"inner.w2": 9}}, name="a")
    one = (drawn(["inner"]), {**SETTINGS, "target_parameters": ["inner.w1"]})
    with pytest.raises(AdapterError, match=r"must target the same parameters of inner \(target_parameters\)"):
        merge_adapters([(tensors, SETTINGS), one])


def test_the_names_of_both_parameters_are_those_of_the_base(tmp_path: Path) -> None:
    base = mixture()
    folder = saved(adapted(base, config(GATES, DOWN), seed=1), tmp_path / "a")
    filters = [{"filter": "gate_up_proj", "value": "base"}, {"value": "average"}]
    merge_adapters([folder, folder], parameters={"matrices": filters}, out=tmp_path / "out")
    changed = added(mixture(), peft.PeftModel.from_pretrained(base, tmp_path / "out"))
    assert {name.rpartition(".")[2] for name in changed} == {"down_proj"}
    document = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert {weight["name"].rpartition(".")[2] for weight in document["weights"]} == {"gate_up_proj", "down_proj"}
