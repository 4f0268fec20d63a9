"""What is read of an adapter is the update that peft itself adds to the base's weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from mergekit_ace.factors.opening import adapters_of_model, open_adapter
from mergekit_ace.factors.tensors import AdapterError
from tests.adapters.makers import adapted, classifier, gpt2, llama, merged_weights, mixture, saved, updates_of
from tests.checkpoints import edit_tensors

# The update is taken from the difference of weights of size 1, in float32.
_TOLERANCE = 2e-6

LINEAR = ["q_proj", "v_proj", "down_proj"]
CASES: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "plain": (llama, peft.LoraConfig(r=3, lora_alpha=12, target_modules=LINEAR)),
    "rslora": (llama, peft.LoraConfig(r=3, lora_alpha=12, target_modules=LINEAR, use_rslora=True)),
    "patterns": (
        llama,
        peft.LoraConfig(
            r=3,
            lora_alpha=12,
            target_modules=LINEAR,
            use_rslora=True,
            rank_pattern={r"layers\.1\.self_attn\.q_proj": 5, "down_proj": 2},
            alpha_pattern={"v_proj": 7, "^model.layers.0.mlp.down_proj": 3},
        ),
    ),
    "regular expression": (llama, peft.LoraConfig(r=2, target_modules=r".*layers\.1.*\.(q|o)_proj")),
    "conv1d": (gpt2, peft.LoraConfig(r=3, lora_alpha=5, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "embedding": (llama, peft.LoraConfig(r=3, lora_alpha=5, target_modules=["embed_tokens", "q_proj"])),
    "experts, one parameter": (
        mixture,
        peft.LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"]),
    ),
    "experts, two parameters": (
        mixture,
        peft.LoraConfig(
            r=2,
            lora_alpha=5,
            target_modules=[],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        ),
    ),
    "adalora": (
        llama,
        peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, target_modules=LINEAR, total_step=10, tinit=1, tfinal=2),
    ),
    "loha": (llama, peft.LoHaConfig(r=2, alpha=3, target_modules=LINEAR)),
    "lokr": (llama, peft.LoKrConfig(r=2, alpha=3, target_modules=LINEAR)),
    "lokr, both factored": (llama, peft.LoKrConfig(r=1, alpha=3, target_modules=LINEAR, decompose_both=True)),
    "lokr, whole": (llama, peft.LoKrConfig(r=64, alpha=3, target_modules=LINEAR)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_an_adapter_is_read_as_peft_adds_it(case: str, tmp_path: Path) -> None:
    make, config = CASES[case]
    base = make()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = adapted(base, config, seed=1)
    after = merged_weights(model)
    updates = updates_of(open_adapter(saved(model, tmp_path / "adapter")))
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert updates.keys() == changed
    for name, update in updates.items():
        expected = after[name] - before[name]
        torch.testing.assert_close(update, expected, atol=_TOLERANCE, rtol=1e-5)
        assert update.norm() > 0.01


def test_the_adapters_of_a_live_model_are_those_of_its_files(tmp_path: Path) -> None:
    model = adapted(llama(), peft.LoraConfig(r=3, target_modules=LINEAR), seed=1)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    folder = saved(model, tmp_path / "both")
    live = adapters_of_model(model)
    assert [adapter.name for adapter in live] == ["default", "second"]
    for adapter, path in zip(live, (folder, folder / "second"), strict=True):
        stored, own = updates_of(open_adapter(path)), updates_of(adapter)
        assert stored.keys() == own.keys()
        assert all(torch.equal(stored[name], own[name]) for name in stored)


def test_a_pickle_is_read_and_one_that_holds_more_is_refused(tmp_path: Path) -> None:
    model = adapted(llama(), peft.LoraConfig(r=3, target_modules=LINEAR), seed=1)
    whole = updates_of(open_adapter(saved(model, tmp_path / "safe")))
    folder = saved(model, tmp_path / "pickle", safe_serialization=False)
    pickled = updates_of(open_adapter(folder))
    assert all(torch.equal(whole[name], pickled[name]) for name in whole)
    torch.save({"step": 7}, folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"must hold tensors alone, .*; it has 'step', of type int"):
        open_adapter(folder)
    torch.save({"model": Path("/tmp")}, folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"adapter_model\.bin must be a whole file of tensors"):
        open_adapter(folder)


def test_whole_modules_biases_and_tokens_are_no_updates(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"], bias="all")
    adapter = open_adapter(saved(adapted(classifier(), config, seed=1), tmp_path / "adapter"))
    assert any(key.endswith("classifier.dense.weight") for key in adapter.replaced)
    assert any(key.endswith("output.dense.bias") for key in adapter.replaced)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [7, 3]})
    adapter = open_adapter(saved(adapted(llama(), config, seed=1), tmp_path / "tokens"))
    assert adapter.tokens["model.embed_tokens"].indices == (7, 3)


REFUSED: dict[str, tuple[Any, str]] = {
    "dora": (peft.LoraConfig(r=2, target_modules=LINEAR, use_dora=True), "DoRA"),
    "pissa": (peft.LoraConfig(r=2, target_modules=LINEAR, init_lora_weights="pissa"), "pissa, which changed the base"),
    "oft": (peft.OFTConfig(oft_block_size=4, target_modules=LINEAR), "OFT, which multiplies the base's weights"),
    "vera": (peft.VeraConfig(r=2, target_modules=LINEAR), "VERA, which is no product of two stored factors"),
    "ia3": (peft.IA3Config(target_modules=LINEAR, feedforward_modules=["down_proj"]), "IA3, which multiplies"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_update_by_itself_is_refused_by_name(case: str, tmp_path: Path) -> None:
    config, words = REFUSED[case]
    folder = saved(adapted(llama(), config, seed=1), tmp_path / f"{case}-adapter")
    with pytest.raises(AdapterError, match=words) as error:
        open_adapter(folder)
    assert f"{case}-adapter" in str(error.value)


def test_folders_that_hold_no_adapter_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="nowhere must be a folder or a file"):
        open_adapter(tmp_path / "nowhere")
    with pytest.raises(AdapterError, match=r"must be a folder with adapter_config\.json"):
        open_adapter(tmp_path)
    folder = saved(adapted(llama(), peft.LoraConfig(r=2, target_modules=LINEAR), seed=1), tmp_path / "outer" / "one")
    with pytest.raises(AdapterError, match="holds 1 adapters; name one of them: one"):
        open_adapter(folder.parent)
    (folder / "adapter_model.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes()[:-100])
    with pytest.raises(AdapterError, match="must be a whole safetensors file"):
        open_adapter(folder)


def changed(folder: Path, change: dict[str, Any]) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    return folder


def test_the_first_pattern_that_fits_counts_though_a_later_one_is_the_modules_name(tmp_path: Path) -> None:
    base, name = llama(), "model.layers.0.self_attn.q_proj.weight"
    before = base.state_dict()[name].clone()
    folder = saved(adapted(base, peft.LoraConfig(r=3, target_modules=LINEAR), seed=1), tmp_path / "a")
    changed(folder, {"alpha_pattern": {"q_proj": 1, "model.layers.0.self_attn.q_proj": 50}})
    expected = merged_weights(peft.PeftModel.from_pretrained(base, folder))[name] - before
    torch.testing.assert_close(updates_of(open_adapter(folder))[name], expected, atol=_TOLERANCE, rtol=1e-5)


WRONG_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "no number": ({"lora_alpha": None}, "lora_alpha of its configuration must be a number; got None"),
    "text": ({"lora_alpha": "16"}, "lora_alpha of its configuration must be a number; got '16'"),
    "not finite": ({"lora_alpha": float("nan")}, "must be a number; got nan"),
    "no rank": ({"r": None}, "r of its configuration must be a number; got None"),
    "rank 0": ({"r": 0}, "the rank of .*down_proj must be a whole number above 0; got 0"),
    "no pattern": (
        {"rank_pattern": {"(q_proj": 4}},
        r"keys of rank_pattern must be regular expressions; got '\(q_proj'",
    ),
    "a list": ({"alpha_pattern": [1, 2]}, "alpha_pattern of its configuration must be an object; got list"),
    "loftq": ({"init_lora_weights": "loftq"}, "Merge it into the quantized model that it was trained on"),
}


@pytest.mark.parametrize("case", WRONG_SETTINGS)
def test_settings_that_cannot_be_used_are_named(case: str, tmp_path: Path) -> None:
    change, words = WRONG_SETTINGS[case]
    folder = saved(adapted(llama(), peft.LoraConfig(r=2, target_modules=LINEAR), seed=1), tmp_path / "adapter")
    with pytest.raises(AdapterError, match=f"adapter .*adapter.* {words}" if case == "loftq" else words):
        open_adapter(changed(folder, change))


PREFIX = "base_model.model."
WRONG_KEYS: dict[str, tuple[Callable[[str], str], str]] = {
    "a name": (lambda key: key.replace("lora_A.", "lora_A.first."), "must not hold an adapter's name"),
    "a name of a table": (
        lambda key: key.replace("embedding_A", "embedding_A.first"),
        "must not hold an adapter's name",
    ),
    "a name of tokens": (
        lambda key: key.replace("tokens_delta", "tokens_delta.first"),
        "must not hold an adapter's name",
    ),
    "a name of whole modules": (
        lambda key: key.replace("lm_head.", "lm_head.modules_to_save.first."),
        "must not hold an adapter's name; got .*lm_head.modules_to_save",
    ),
    "torch.compile": (lambda key: key.replace("layers.0", "layers.0._orig_mod"), "with _orig_mod of torch.compile"),
    "fsdp": (
        lambda key: key.replace("model.layers", "model._fsdp_wrapped_module.layers"),
        "of FSDP, which peft passes",
    ),
    "another beginning": (lambda key: f"module.{key}", "must begin with base_model.model.; .*keys without module.$"),
}


@pytest.mark.parametrize("case", WRONG_KEYS)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_keys_that_peft_passes_over_are_named(case: str, tmp_path: Path) -> None:
    rename, words = WRONG_KEYS[case]
    options: dict[str, Any] = {"modules_to_save": ["lm_head"]}
    options |= {"trainable_token_indices": [1]} if "tokens" in case else {}
    targets = [*LINEAR, "embed_tokens"] if "table" in case else LINEAR
    folder = saved(adapted(llama(), peft.LoraConfig(r=2, target_modules=targets, **options), seed=1), tmp_path / "a")
    with edit_tensors(folder / "adapter_model.safetensors") as tensors:
        renamed = {rename(key): tensor for key, tensor in tensors.items()}
        assert renamed.keys() != tensors.keys()
        tensors.clear()
        tensors.update(renamed)
    with pytest.raises(AdapterError, match=words):
        open_adapter(folder)
