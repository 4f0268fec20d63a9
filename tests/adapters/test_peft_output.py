"""A merged adapter in peft's hands: it loads without a warning, trains on, and adds what was merged."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mergekit_ace import merge_adapters
from mergekit_ace.factors.opening import adapters_of_model, open_adapter
from mergekit_ace.factors.tensors import AdapterError
from tests.adapters.makers import adapted, classifier, gpt2, llama, merged_weights, mixture, saved, updates_of

# Differences of float32 weights of size 1.
_TOLERANCE = 5e-6
AVERAGE = {"matrices": "average"}
LINEAR = ["q_proj", "v_proj", "down_proj"]


def average(folders: list[Path], weights: list[float]) -> dict[str, torch.Tensor]:
    """What averaging must give, from the updates alone; an adapter without the module did not change it."""
    total: dict[str, torch.Tensor] = {}
    for folder, weight in zip(folders, weights, strict=True):
        for name, update in updates_of(open_adapter(folder)).items():
            total[name] = total.get(name, torch.zeros_like(update)) + update * weight / sum(weights)
    return total


def load(base: nn.Module, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(base, folder)


CASES: dict[str, tuple[Any, list[Any]]] = {
    "ranks and targets that differ": (
        llama,
        [
            peft.LoraConfig(r=3, lora_alpha=12, target_modules=LINEAR, use_rslora=True, task_type="CAUSAL_LM"),
            peft.LoraConfig(
                r=2, target_modules=["q_proj", "o_proj"], rank_pattern={"o_proj": 4}, task_type="CAUSAL_LM"
            ),
        ],
    ),
    "some layers only": (
        llama,
        [
            peft.LoraConfig(r=3, target_modules=LINEAR, layers_to_transform=[1]),
            peft.LoraConfig(r=2, target_modules=r".*layers\.0.*q_proj"),
        ],
    ),
    "conv1d": (
        gpt2,
        [peft.LoraConfig(r=r, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True) for r in (2, 3)],
    ),
    "experts": (
        mixture,
        [
            peft.LoraConfig(
                r=r,
                lora_alpha=5,
                target_modules=["q_proj"],
                target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            )
            for r in (1, 2)
        ],
    ),
    "embedding": (llama, [peft.LoraConfig(r=r, target_modules=["embed_tokens", "q_proj"]) for r in (2, 3)]),
    "loha with lora": (
        llama,
        [peft.LoHaConfig(r=2, alpha=3, target_modules=["q_proj"]), peft.LoraConfig(r=2, target_modules=["q_proj"])],
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_peft_adds_what_was_merged(case: str, tmp_path: Path) -> None:
    make, configs = CASES[case]
    base = make()
    folders = [saved(adapted(base, config, seed=i), tmp_path / f"a{i}") for i, config in enumerate(configs)]
    merged = merge_adapters(folders, parameters=AVERAGE, weights=[1.0, 3.0], out=tmp_path / "out")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = load(base, tmp_path / "out")
    after = merged_weights(model)
    expected = average(folders, [1.0, 3.0])
    assert {name for name in before if not torch.equal(before[name], after[name])} == expected.keys()
    for name, update in expected.items():
        torch.testing.assert_close(after[name] - before[name], update, atol=_TOLERANCE, rtol=1e-4)
    assert merged.configuration == json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert stored.keys() == merged.tensors.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in merged.tensors.items())


def test_short_target_names_are_kept_where_they_mean_the_same_modules(tmp_path: Path) -> None:
    base = llama()
    configs = [peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), peft.LoraConfig(r=2, target_modules=LINEAR)]
    folders = [saved(adapted(base, config, seed=i), tmp_path / f"a{i}") for i, config in enumerate(configs)]
    assert merge_adapters(folders).configuration["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    filters = [{"filter": "layers.0", "value": "base"}, {"value": "ace"}]
    dropped = merge_adapters(folders, parameters={"matrices": filters})
    assert dropped.configuration["target_modules"] == [
        f"model.layers.1.{name}" for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    ]


def test_whole_modules_and_biases_are_averaged_and_saved_as_such(tmp_path: Path) -> None:
    base = classifier()
    config = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"], bias="lora_only")
    models = [adapted(base, config, seed=i) for i in range(2)]
    folders = [saved(model, tmp_path / f"a{i}") for i, model in enumerate(models)]
    merge_adapters(folders, parameters=AVERAGE, weights=[1.0, 3.0], out=tmp_path / "out")
    first, second = (merged_weights(model) for model in models)
    after = merged_weights(load(base, tmp_path / "out"))
    for name in ("classifier.dense.weight", "roberta.encoder.layer.0.attention.self.query.bias"):
        assert not torch.equal(first[name], second[name])
        torch.testing.assert_close(after[name], first[name] / 4 + second[name] * 3 / 4)


@pytest.mark.filterwarnings("ignore:.*LoRA tensor.* have invalid shape")
def test_a_bias_of_the_factors_is_averaged_over_all_adapters(tmp_path: Path) -> None:
    base = classifier()
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["query"], lora_bias=True)
    plain = peft.LoraConfig(r=2, target_modules=["query", "key"])
    models = [adapted(base, config, seed=0), adapted(base, plain, seed=1)]
    folders = [saved(model, tmp_path / f"a{i}") for i, model in enumerate(models)]
    merge_adapters(folders, parameters=AVERAGE, weights=[1.0, 3.0], out=tmp_path / "out")
    before, with_bias = base.state_dict(), merged_weights(models[0])
    after = merged_weights(load(base, tmp_path / "out"))
    name = "roberta.encoder.layer.1.attention.self.query.bias"
    torch.testing.assert_close(after[name] - before[name], (with_bias[name] - before[name]) / 4)
    key = "roberta.encoder.layer.1.attention.self.key.bias"
    assert torch.equal(after[key], before[key])


def test_every_token_is_averaged_over_the_adapters_that_trained_it(tmp_path: Path) -> None:
    base = llama()
    tokens = ([7, 3], [3, 11])
    models = [
        adapted(
            base,
            peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": indices}),
            seed=i,
        )
        for i, indices in enumerate(tokens)
    ]
    folders = [saved(model, tmp_path / f"a{i}") for i, model in enumerate(models)]
    merge_adapters(folders, out=tmp_path / "out")
    untouched = base.state_dict()["model.embed_tokens.weight"][0].clone()
    first, second = (merged_weights(model)["model.embed_tokens.weight"] for model in models)
    after = merged_weights(load(base, tmp_path / "out"))["model.embed_tokens.weight"]
    torch.testing.assert_close(after[[7, 11]], torch.stack([first[7], second[11]]))
    torch.testing.assert_close(after[3], (first[3] + second[3]) / 2)
    assert torch.equal(after[0], untouched)


def test_a_merged_adapter_trains_on(tmp_path: Path) -> None:
    base = llama()
    config = peft.LoraConfig(r=2, target_modules=LINEAR, task_type="CAUSAL_LM")
    folders = [saved(adapted(base, config, seed=i), tmp_path / f"a{i}") for i in range(2)]
    merge_adapters(folders, out=tmp_path / "out")
    model = peft.PeftModel.from_pretrained(base, tmp_path / "out", is_trainable=True)
    batch = torch.arange(8).reshape(1, 8)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        loss = model(input_ids=batch, labels=batch).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[0]


def test_the_adapters_of_a_live_model_become_one_of_it() -> None:
    model = adapted(llama(), peft.LoraConfig(r=3, lora_alpha=12, target_modules=LINEAR), seed=1)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    merged = merge_adapters(model, parameters=AVERAGE)
    assert merged.report.adapters == ("default", "second")
    first, second = (updates_of(adapter) for adapter in adapters_of_model(model))
    model.add_adapter("merged", peft.LoraConfig(**merged.configuration))
    peft.set_peft_model_state_dict(model, merged.tensors, adapter_name="merged")
    (loaded,) = adapters_of_model(model, ["merged"])
    for name, update in updates_of(loaded).items():
        expected = (first[name] + second.get(name, torch.zeros_like(update))) / 2
        torch.testing.assert_close(update, expected, atol=1e-6, rtol=1e-5)
    assert set(updates_of(loaded)) == set(first)


def test_a_module_that_one_adapter_saves_whole_and_another_adapts_is_refused(tmp_path: Path) -> None:
    base = classifier()
    whole = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])
    factors = peft.LoraConfig(r=2, target_modules=["query", "classifier.dense"])
    folders = [saved(adapted(base, config, seed=i), tmp_path / f"a{i}") for i, config in enumerate((whole, factors))]
    with pytest.raises(AdapterError, match=r"classifier\.dense\.weight must be adapted by factors in all .*a1.*a0"):
        merge_adapters(folders)


def test_a_rank_is_kept_by_every_module(tmp_path: Path) -> None:
    base = llama()
    config = peft.LoraConfig(r=4, target_modules=LINEAR)
    folders = [saved(adapted(base, config, seed=i), tmp_path / f"a{i}") for i in range(3)]
    merged = merge_adapters(folders, rank=5)
    assert merged.configuration["r"] == merged.configuration["lora_alpha"] == 5
    assert {weight.rank for weight in merged.report.weights} == {5}
    assert all(0.4 < weight.energy_kept < 1 for weight in merged.report.weights)
    whole = merge_adapters(folders)
    assert {weight.rank for weight in whole.report.weights} == {12}
    assert all(weight.energy_kept == 1 for weight in whole.report.weights)
    by_energy = merge_adapters(folders, rank="auto")
    assert all(weight.energy_kept >= 0.99 for weight in by_energy.report.weights)
    assert all(weight.rank <= 12 for weight in by_energy.report.weights)


def test_identical_adapters_are_one_of_their_own_rank(tmp_path: Path) -> None:
    base = llama()
    folder = saved(adapted(base, peft.LoraConfig(r=3, target_modules=LINEAR), seed=1), tmp_path / "a")
    merged = merge_adapters([folder, folder])
    assert {weight.rank for weight in merged.report.weights} == {3}
    assert merged.configuration["rank_pattern"] == {}


def test_adapters_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    folders = []
    for index, (name, width) in enumerate((("small", 24), ("wide", 32))):
        base = llama() if width == 24 else llama(head_dim=8)
        folders.append(saved(adapted(base, config, seed=index), tmp_path / name))
        file = folders[-1] / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": f"somewhere/{name}"}))
    with pytest.raises(AdapterError, match=r"must be of one base model; .*small was trained on somewhere/small"):
        merge_adapters(folders)
    with pytest.raises(AdapterError, match=r"q_proj\.weight must be the same weight for all adapters; it is linear"):
        merge_adapters(folders, base="somewhere/small")
    other = adapted(gpt2(), peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True), seed=3)
    with pytest.raises(AdapterError, match="must have modules in common"):
        merge_adapters([folders[0], saved(other, tmp_path / "other")], base="somewhere/small")


def test_nan_in_an_adapter_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    base = llama()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    models = [adapted(base, config, seed=i) for i in range(2)]
    with torch.no_grad():
        next(p for n, p in models[1].named_parameters() if "layers.1" in n and "lora_B" in n)[0, 0] = torch.nan
    folders = [saved(model, tmp_path / f"a{i}") for i, model in enumerate(models)]
    with pytest.raises(AdapterError, match=r"layers\.1\.self_attn\.q_proj\.weight: .*a1 holds NaN"):
        merge_adapters(folders, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_what_cannot_be_asked_for_is_refused(tmp_path: Path) -> None:
    base = llama()
    folder = saved(adapted(base, peft.LoraConfig(r=2, target_modules=["q_proj"]), seed=1), tmp_path / "a")
    other = saved(adapted(base, peft.LoraConfig(r=2, target_modules=["q_proj"]), seed=2), tmp_path / "b")
    with pytest.raises(ValueError, match="weights must be one for each of the 2 adapters; got 1"):
        merge_adapters([folder, other], weights=[1.0])
    with pytest.raises(ValueError, match=r"parameters must be of ace: .*; got epsylon"):
        merge_adapters([folder, other], parameters={"epsylon": 1})
    for rank in (0, True, 1.5):
        with pytest.raises(ValueError, match="rank must be a whole number above 0"):
            merge_adapters([folder, other], rank=rank)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^[^\n]*parameter weight must be a finite number of at least 0; got -1$"):
        merge_adapters([folder, other], weights=[-1, 1])
    for dtype in (torch.int8, "float16"):
        with pytest.raises(ValueError, match="dtype must be a floating-point type of torch"):
            merge_adapters([folder, other], dtype=dtype)  # type: ignore[arg-type]
    state = load_file(folder / "adapter_model.safetensors")
    for source in ((state, state, state), ({"r": 2}, 3), None):
        with pytest.raises(AdapterError, match=r"adapters must be folders, state dicts .*number 1 is of type"):
            merge_adapters([source])
    with pytest.raises(AdapterError, match=r"merge_method must be one that gives an adapter: ace, .*; got ties"):
        merge_adapters([folder, other], method="ties")
    with pytest.raises(AdapterError, match="solver: adam moves every entry"):
        merge_adapters([folder, other], method="wudi", parameters={"solver": "adam"})


def test_a_trained_bias_is_one_tensor_whether_its_module_has_factors_or_not(tmp_path: Path) -> None:
    """`query.base_layer.bias` of one adapter is `query.bias` of another, which peft passes over beside factors."""
    base = classifier()
    configs = [
        peft.LoraConfig(r=2, target_modules=["query"], bias="lora_only"),
        peft.LoraConfig(r=2, target_modules=["key"], bias="all"),
    ]
    models = [adapted(base, config, seed=i) for i, config in enumerate(configs)]
    folders = [saved(model, tmp_path / f"a{i}") for i, model in enumerate(models)]
    merge_adapters(folders, parameters=AVERAGE, out=tmp_path / "out")
    first, second = (merged_weights(model) for model in models)
    after = merged_weights(load(base, tmp_path / "out"))
    for module in ("query", "key", "value"):
        name = f"roberta.encoder.layer.1.attention.self.{module}.bias"
        expected = (first[name] + second[name]) / 2 if module == "query" else second[name]
        torch.testing.assert_close(after[name], expected)


def test_a_state_dict_comes_with_pefts_own_configuration(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, lora_alpha=7, target_modules=["q_proj", "v_proj"])
    folder = saved(adapted(llama(), config, seed=1), tmp_path / "a")
    state = load_file(folder / "adapter_model.safetensors")
    found, expected = merge_adapters([(state, config)]).tensors, merge_adapters([folder]).tensors
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_tokens_of_one_adapter_of_a_live_model_are_named() -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3])
    model = adapted(llama(), config, seed=1)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    with pytest.raises(AdapterError, match=r"peft cannot give the tensors of the adapter second .*a model of its own"):
        merge_adapters(model)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of what torch.compile imports
def test_a_live_model_may_be_compiled_or_given_without_its_shell() -> None:
    model = adapted(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]), seed=1)
    expected = merge_adapters(model).tensors
    for given in (torch.compile(model), model.base_model, model.get_base_model()):
        found = merge_adapters(given).tensors
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
