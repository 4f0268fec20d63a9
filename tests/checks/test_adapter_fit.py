"""Adapters that peft would load without a message, and that do nothing, or less than they hold."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from click.testing import CliRunner
from mergekit.common import ModelReference
from mergekit.options import MergeOptions
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from mergekit_ace.checks.adapter_fit import check_fit
from mergekit_ace.cli import main
from mergekit_ace.recipe.findings import Finding
from tests.checkpoints import Suite, Update, add_adapter, edit_tensors, make_suite, read_tensors
from tests.commands import mergekit_yaml
from tests.report.recipes import document, write

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    return make_suite("llama", tmp_path_factory.mktemp("llama"), experts=1, update=Update.EVEN, scale=0.05)


@pytest.fixture(scope="module")
def adapter(llama: Suite, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_adapter(llama.base.path, tmp_path_factory.mktemp("adapter") / "a", rank=2, targets=["q_proj", "up_proj"])


def findings(base: Path, adapter: Path) -> list[Finding]:
    return list(check_fit(ModelReference.model_validate(f"{base}+{adapter}"), MergeOptions()))


def changed(adapter: Path, folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    shutil.copytree(adapter, folder)
    with edit_tensors(folder / "adapter_model.safetensors") as tensors:
        result = change(dict(tensors))
        tensors.clear()
        tensors.update(result)
    return folder


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def untrained(tensors: Tensors) -> Tensors:
    return {name: tensor * 0 if "lora_B" in name else tensor for name, tensor in tensors.items()}


NOTHING = {
    "untrained": (untrained, "all 6 of its matrices B are 0", "Check that it was trained"),
    "another family's keys": (
        renamed("base_model.model.model.layers", "base_model.model.transformer.h"),
        "matches base_model.model.transformer.h.0.mlp.up_proj.lora_A.weight",
        "if they began with base_model.model.model.layers. in place of base_model.model.transformer.h.",
    ),
    "no prefix": (renamed("base_model.model.", ""), "matches model.layers.0", "if they began with base_model.model.:"),
    "a vision model's keys": (
        renamed("model.model.layers", "model.model.language_model.layers"),
        "no module of",
        "if they began with base_model.model.model. in place of base_model.model.model.language_model.",
    ),
    "no tensors": (lambda _: {}, "holds no tensor", "Train it"),
}


@pytest.mark.parametrize("kind", NOTHING)
def test_an_adapter_that_does_nothing_is_an_error(kind: str, llama: Suite, adapter: Path, tmp_path: Path) -> None:
    change, words, remedy = NOTHING[kind]
    (finding,) = findings(llama.base.path, changed(adapter, tmp_path / "idle", change))
    assert finding.level == "error"
    assert f"the adapter {tmp_path / 'idle'}" in finding.what
    assert words in finding.what
    assert remedy in finding.remedy


@pytest.mark.parametrize("command", ["check", "merge"])
@pytest.mark.parametrize("kind", ["untrained", "another family's keys"])
def test_check_and_merge_name_it(kind: str, command: str, llama: Suite, adapter: Path, tmp_path: Path) -> None:
    idle = changed(adapter, tmp_path / "idle", NOTHING[kind][0])
    recipe = write(document(llama, models=[{"model": f"{llama.base.path}+{idle}"}]), tmp_path / "recipe.yml")
    out = [str(tmp_path / "out")] if command == "merge" else []
    result = CliRunner().invoke(main, [command, str(recipe), *out, "--lora-merge-cache", str(tmp_path / "cache")])
    assert result.exit_code == 1
    assert f"the adapter {idle} of {llama.base.path}+{idle} does nothing" in result.output
    assert not (tmp_path / "cache").exists()


def test_alpha_0_is_nothing_too(llama: Suite, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama.base.path)
    config = peft.LoraConfig(r=2, lora_alpha=0, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "a")
    (finding,) = findings(llama.base.path, tmp_path / "a")
    assert "its lora_alpha is 0" in finding.what


def test_what_is_ignored_in_part_is_a_warning(llama: Suite, adapter: Path, tmp_path: Path) -> None:
    (finding,) = findings(llama.base.path, changed(adapter, tmp_path / "a", renamed("layers.2", "layers.7")))
    assert finding.level == "warning"
    assert "4 of its 12 tensors are ignored" in finding.what
    assert "layers.7.mlp.up_proj" in finding.what


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_one_factor_alone_is_no_update(factor: str, llama: Suite, adapter: Path, tmp_path: Path) -> None:
    (finding,) = findings(llama.base.path, changed(adapter, tmp_path / "a", without(factor)))
    assert finding.level == "error"
    assert "must hold both factors of an update; base_model.model.model.layers.0" in finding.what
    assert "and 3 more has one alone" in finding.what


@pytest.mark.filterwarnings("ignore::UserWarning")  # of peft, on saving its own biases
def test_biases_of_an_adapter_are_in_one_factor_alone(tmp_path: Path) -> None:
    base = make_suite("roberta", tmp_path, experts=1).base.path
    config = peft.LoraConfig(r=2, target_modules=["query"], lora_bias=True, init_lora_weights=False)
    peft.get_peft_model(AutoModelForSequenceClassification.from_pretrained(base), config).save_pretrained(
        tmp_path / "a"
    )
    assert findings(base, tmp_path / "a") == []


def test_layers_that_are_not_there_are_a_warning(llama: Suite, adapter: Path, tmp_path: Path) -> None:
    (finding,) = findings(llama.base.path, changed(adapter, tmp_path / "a", without("layers.1")))
    assert finding.level == "warning"
    assert "lacks 4 of the 12 tensors that its configuration names: base_model.model.model.layers.1" in finding.what


def test_an_adapter_of_another_architecture(adapter: Path, tmp_path: Path) -> None:
    base = make_suite("gpt2", tmp_path, experts=1).base.path
    (finding,) = findings(base, adapter)
    assert "does nothing: no module of" in finding.what
    assert "target_modules q_proj, up_proj" in finding.what


@pytest.mark.parametrize(
    ("targets", "config", "saving"),
    [
        (["q_proj"], {"modules_to_save": ["embed_tokens", "lm_head"]}, {}),
        (["q_proj"], {}, {"save_embedding_layers": True}),
        (["q_proj", "embed_tokens"], {}, {}),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_resized_vocabulary_says_what_to_do(
    targets: list[str], config: dict[str, Any], saving: dict[str, Any], llama: Suite, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama.base.path)
    model.resize_token_embeddings(100)
    lora = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **config)
    peft.get_peft_model(model, lora).save_pretrained(tmp_path / "a", **saving)
    (finding,) = findings(llama.base.path, tmp_path / "a")
    assert finding.level == "error"
    assert "was trained after its base's vocabulary was resized" in finding.what
    assert "is (100, 32) for (96, 32)" in finding.what
    assert "model.resize_token_embeddings(100)" in finding.remedy


def test_an_adapter_of_a_larger_model(llama: Suite, adapter: Path, tmp_path: Path) -> None:
    def wider(tensors: Tensors) -> Tensors:
        return {
            name: torch.ones(tensor.shape[0], 64) if "lora_A" in name else tensor for name, tensor in tensors.items()
        }

    (finding,) = findings(llama.base.path, changed(adapter, tmp_path / "a", wider))
    assert "was trained on a model of another size" in finding.what


def test_prompts_are_no_change_of_weights(llama: Suite, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama.base.path)
    config = peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "a")
    (finding,) = findings(llama.base.path, tmp_path / "a")
    assert "which is no change of weights" in finding.what


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
        peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, init_lora_weights=False),
        peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
        peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False),
        peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 2], init_lora_weights=False),
        # Its B is 0, and what it saved whole is not.
        peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        peft.LoHaConfig(r=2, target_modules=["q_proj"], init_weights=False),
        peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_adapters_of_every_kind_pass(config: peft.PeftConfig, llama: Suite, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama.base.path)
    peft.get_peft_model(model, copy.deepcopy(config)).save_pretrained(tmp_path / "a")
    assert findings(llama.base.path, tmp_path / "a") == []


@pytest.mark.parametrize(
    ("family", "target"), [("gpt2", "c_attn"), ("mixtral", "q_proj"), ("qwen3-moe", "o_proj"), ("mamba", "in_proj")]
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")
def test_adapters_of_every_family_pass(family: str, target: str, tmp_path: Path) -> None:
    base = make_suite(family, tmp_path, experts=1).base.path
    adapter = add_adapter(base, tmp_path / "a", rank=2, targets=[target])
    assert findings(base, adapter) == []


def started(llama: Suite, folder: Path, start: str) -> tuple[Path, Tensors]:
    """An adapter with a start, as saved, and the model that it was trained in."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=start)  # type: ignore[arg-type]
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(llama.base.path, dtype=torch.float32), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.01)
    model.save_pretrained(folder)
    return folder, {name: tensor.clone() for name, tensor in model.merge_and_unload().state_dict().items()}


@pytest.mark.parametrize("command", ["check", "merge"])
def test_a_start_that_is_drawn_anew_is_an_error(command: str, llama: Suite, tmp_path: Path) -> None:
    """The update that was merged had twice the trained one's norm, and was another one every time."""
    folder, _ = started(llama, tmp_path / "a", "pissa_niter_4")
    recipe = write(document(llama, models=[{"model": f"{llama.base.path}+{folder}"}]), tmp_path / "recipe.yml")
    out = [str(tmp_path / "out")] if command == "merge" else []
    result = CliRunner().invoke(main, [command, str(recipe), *out, "--lora-merge-cache", str(tmp_path / "cache")])
    assert result.exit_code == 1
    assert "was started by init_lora_weights: pissa_niter_4" in result.output.replace("\n", " ")
    assert "path_initial_model_for_weight_conversion" in result.output
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_is_found_again_is_merged_as_trained(start: str, llama: Suite, tmp_path: Path) -> None:
    folder, trained = started(llama, tmp_path / "a", start)
    assert findings(llama.base.path, folder) == []
    recipe = document(llama, models=[{"model": f"{llama.base.path}+{folder}"}], dtype="float32")
    flags = ("--lora-merge-cache", str(tmp_path / "cache"), "--lora-merge-dtype", "float32", "--quiet")
    merged = read_tensors(mergekit_yaml(recipe, tmp_path / "out", *flags))
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, trained[name], atol=1e-6, rtol=1e-6)
