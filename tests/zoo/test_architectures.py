"""Each architecture that mergekit plans, or that `mergekit-pytorch` takes as it is."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.checkpoints import FAMILIES, Suite, edit_tensors, make_suite, read_tensors
from tests.checkpoints.suite import Checkpoint
from tests.commands import mergekit_pytorch, mergekit_yaml
from tests.end_to_end.comparison import assert_merged, assert_suite_merged, recipe_for, reference_for
from tests.zoo.forward import load_and_run

# Llama, GPT-2, RoBERTa, Mixtral and Qwen3-MoE are held to more in tests/end_to_end.
PLANNED = ("qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "mamba", "olmo", "t5", "qwen3-vision")
RUN_ONLY = ("llama", "llama-tied", "gpt2", "roberta", "mixtral", "qwen3-moe")
# What mergekit 0.1.5 cannot plan, or plans wrongly, its other command merges file by file. The mixtures hold each
# expert's matrices apart on disk, where `mergekit-yaml` stacks them.
RAW = ("vit", "clip", "whisper", "gpt-neox", "bert", "gpt2", "mixtral", "qwen3-moe")

# Initial values this small leave the activations of 16-bit models finite whatever the updates are.
SCALE = 0.1


@pytest.mark.parametrize("family", PLANNED)
def test_mergekit_yaml(family: str, tmp_path: Path) -> None:
    suite = make_suite(family, tmp_path, scale=SCALE)
    out = mergekit_yaml(recipe_for(suite), tmp_path / "out")
    assert_suite_merged(read_tensors(out), suite, reference_for(suite.family))
    load_and_run(suite.family, out)


@pytest.mark.parametrize("family", RUN_ONLY)
def test_the_output_runs(family: str, tmp_path: Path) -> None:
    suite = make_suite(family, tmp_path, dtype=torch.bfloat16, scale=SCALE)
    load_and_run(suite.family, mergekit_yaml(recipe_for(suite), tmp_path / "out"))


def raw_recipe(suite: Suite, **parameters: object) -> dict[str, object]:
    """The recipe of `mergekit-pytorch`, which names files."""
    recipe = recipe_for(suite, **parameters)
    experts = [{"model": str(expert.path / "model.safetensors")} for expert in suite.experts]
    return {**recipe, "base_model": str(suite.base.path / "model.safetensors"), "models": experts}


@pytest.mark.parametrize("family", RAW)
def test_mergekit_pytorch(family: str, tmp_path: Path) -> None:
    suite = make_suite(family, tmp_path, scale=SCALE)
    out = mergekit_pytorch(raw_recipe(suite), tmp_path / "out")
    assert read_tensors(out).keys() == read_tensors(suite.base.path).keys()
    assert_suite_merged(read_tensors(out), suite, reference_for(suite.family))
    shutil.copy(suite.base.path / "config.json", out)
    load_and_run(suite.family, out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gpt_neox_as_the_hub_has_it(dtype: torch.dtype, tmp_path: Path) -> None:
    """Old checkpoints hold buffers that are no weights; the one for masking is -inf in float16."""
    suite = make_suite("gpt-neox", tmp_path, dtype=dtype, scale=SCALE)
    suite = Suite(
        suite.family, _with_buffers(suite.base), [_with_buffers(expert) for expert in suite.experts], suite.updates
    )
    merged = read_tensors(mergekit_yaml(recipe_for(suite), tmp_path / "out"))
    buffers = {name: tensor for name, tensor in merged.items() if _is_buffer(name)}
    assert len(buffers) == 9
    assert all(torch.equal(tensor, suite.base.tensors[name]) for name, tensor in buffers.items())
    weights = {name: tensor for name, tensor in merged.items() if name not in buffers}
    assert_merged(weights, suite.base, suite.experts, reference_for(suite.family))


def _is_buffer(name: str) -> bool:
    return name.endswith(("attention.bias", "masked_bias", "inv_freq"))


def _with_buffers(checkpoint: Checkpoint) -> Checkpoint:
    with edit_tensors(checkpoint.path / "model.safetensors") as tensors:
        dtype = next(iter(tensors.values())).dtype
        for layer in range(3):
            prefix = f"gpt_neox.layers.{layer}.attention"
            tensors[f"{prefix}.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
            tensors[f"{prefix}.masked_bias"] = torch.tensor(-1e9).to(dtype)
            tensors[f"{prefix}.rotary_emb.inv_freq"] = torch.tensor([1.0, 0.1]).to(dtype)
    return Checkpoint(checkpoint.path, tensors)


def test_each_family_is_here() -> None:
    assert set(PLANNED) | set(RUN_ONLY) | set(RAW) == FAMILIES.keys()
