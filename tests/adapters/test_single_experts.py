"""Adapters of single experts, from before transformers 5 stacked them: peft stacks their factors when it loads them."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from mergekit.common import ModelReference
from mergekit.options import MergeOptions
from safetensors.torch import save_file
from torch import Tensor, nn

from mergekit_ace import merge_adapters
from mergekit_ace.checks.adapter_fit import check_fit
from tests.adapters.makers import SMALL, adapted, merged_weights, saved

# Differences of float32 weights of size 1.
_TOLERANCE = 5e-6
EXPERTS = 3


def base() -> Any:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SMALL, num_local_experts=EXPERTS, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config).eval()


def old_adapter(folder: Path, rank: int) -> Path:
    """With the keys that an older peft wrote."""
    hidden, inner = SMALL["hidden_size"], SMALL["intermediate_size"]
    tensors: dict[str, Tensor] = {}
    for layer in range(2):
        for expert in range(EXPERTS):
            for name, (n, m) in {"w1": (hidden, inner), "w3": (hidden, inner), "w2": (inner, hidden)}.items():
                module = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                tensors[f"{module}.lora_A.weight"] = torch.randn(rank, n) * 0.1
                tensors[f"{module}.lora_B.weight"] = torch.randn(m, rank) * 0.1
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    peft.LoraConfig(r=rank, lora_alpha=8, target_modules=["w1", "w2", "w3"]).save_pretrained(folder)
    return folder


def added(folder: Path) -> dict[str, Tensor]:
    before = base().state_dict()
    after = merged_weights(peft.PeftModel.from_pretrained(base(), folder))
    return {name: after[name] - tensor for name, tensor in before.items() if not torch.equal(after[name], tensor)}


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    attention = peft.LoraConfig(r=3, target_modules=["q_proj"])
    return [old_adapter(tmp_path / "experts", 2), saved(adapted(base(), attention, seed=1), tmp_path / "attention")]


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match any targeted module")
@pytest.mark.parametrize("rank", [None, 4, "auto"])
def test_what_comes_out_is_stacked_too(rank: Any, adapters: list[Path], tmp_path: Path) -> None:
    """Experts of one rank, though the adapters have others; and none is left out that keeps the base's values."""
    filters = [{"filter": "experts.1.", "value": "base"}, {"value": "average"}]
    merge_adapters(adapters, parameters={"matrices": filters}, rank=rank, out=tmp_path / "out")
    found, expected = added(tmp_path / "out"), {}
    for folder in adapters:
        expected |= {name: update / len(adapters) for name, update in added(folder).items()}
    for name, update in expected.items():
        if "experts" in name:
            update[1] = 0
    assert found.keys() == expected.keys()
    for name, update in expected.items():
        torch.testing.assert_close(found[name], update, atol=_TOLERANCE, rtol=1e-4)


def test_they_lack_nothing(adapters: list[Path], tmp_path: Path) -> None:
    model: nn.Module = copy.deepcopy(base())
    model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    reference = ModelReference.model_validate(f"{tmp_path / 'base'}+{adapters[0]}")
    assert list(check_fit(reference, MergeOptions())) == []
