"""What `check_recipe` finds in recipes and checkpoints spoiled on purpose; in sound ones, nothing."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from mergekit.options import MergeOptions
from safetensors.torch import load_file

from mergekit_ace.checks.whole_recipe import Examination, check_recipe
from mergekit_ace.cli import main
from mergekit_ace.recipe.findings import Level
from tests.checkpoints import Suite, Update, add_adapter, edit_tensors, make_suite, save_tokenizer
from tests.report.recipes import document, write

# Updates small beside the weights, as those of a fine-tune are.
SMALL = 0.05


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    return make_suite("llama", tmp_path_factory.mktemp("llama"), experts=2, update=Update.EVEN, scale=SMALL)


def examine(recipe: dict[str, Any], folder: Path, **options: Any) -> Examination:
    return check_recipe(write(recipe, folder / "recipe.yml"), MergeOptions(**options))


def found(examination: Examination, level: Level) -> list[str]:
    return [f"{finding.what} | {finding.remedy}" for finding in examination.findings if finding.level == level]


def copy(suite: Suite, folder: Path) -> Path:
    return Path(shutil.copytree(suite.experts[0].path, folder / "expert"))


def with_expert(suite: Suite, expert: Path | str, **entries: Any) -> dict[str, Any]:
    models = [{"model": str(expert)}, {"model": str(suite.experts[1].path)}]
    return document(suite, models=models, **entries)


def edit_config(model: Path, **entries: Any) -> None:
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def test_a_sound_recipe_has_no_findings_and_a_cost(llama: Suite, tmp_path: Path) -> None:
    examination = examine(document(llama), tmp_path)
    assert examination.findings == ()
    size = sum(tensor.nbytes for tensor in load_file(llama.base.path / "model.safetensors").values())
    assert examination.cost is not None
    assert examination.cost.read == 3 * size
    assert examination.cost.written == size
    assert examination.cost.seconds is not None
    assert examination.cost.seconds > 0
    assert examination.cost.workspace < examination.cost.memory


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (
            {"parameters": {"epsilom": 1}},
            "no parameter 'epsilom'; mergekit ignores it without a message | Did you mean epsilon?",
        ),
        # Of another method, whatever of ours its name resembles.
        (
            {"parameters": {"int8_mask": True}},
            "no parameter 'int8_mask'; mergekit ignores it without a message | Remove",
        ),
        (
            {"parameters": {"density": 0.5}},
            "Remove it: it is a parameter of breadcrumbs, breadcrumbs_ties, dare_linear.",
        ),
        ({"paramters": {}}, "mergekit does not read 'paramters' in the recipe | Did you mean parameters?"),
        ({"merge_method": "acee"}, "got 'acee' | Did you mean ace?"),
        ({"parameters": {"epsilon": -1}}, "parameter epsilon must be a finite number above 0, or 'auto'; got -1"),
    ],
)
def test_misspellings_are_errors_with_the_nearest_name(
    llama: Suite, entries: dict[str, Any], words: str, tmp_path: Path
) -> None:
    assert [words in text for text in found(examine(document(llama, **entries), tmp_path), "error")] == [True]


def test_parameters_where_nobody_reads_them(llama: Suite, tmp_path: Path) -> None:
    recipe = document(llama)
    recipe["models"][0]["parameters"] = {"epsilon": 1.0, "weight": 2.0}
    recipe["models"].append({"model": str(llama.base.path), "parameters": {"weight": 1.0}})
    examination = examine(recipe, tmp_path)
    assert ["epsilon is one value for all models" in text for text in found(examination, "error")] == [True]
    assert ["weight has no effect on the base" in text for text in found(examination, "warning")] == [True]


def test_an_empty_list_is_no_value(llama: Suite, tmp_path: Path) -> None:
    errors = found(examine(document(llama, parameters={"epsilon": []}), tmp_path), "error")
    assert ["epsilon is an empty list" in text for text in errors] == [True]


def test_filters_that_match_nothing_or_are_never_reached(llama: Suite, tmp_path: Path) -> None:
    filters = [
        {"filter": "mlpp", "value": 1.0},
        {"filter": "self_attn", "value": 2.0},
        {"value": 3.0},
        {"filter": "mlp", "value": 4.0},
    ]
    warnings = found(examine(document(llama, parameters={"epsilon": filters}), tmp_path), "warning")
    assert len(warnings) == 2
    assert "'mlpp' of epsilon matches no tensor | Did you mean mlp?" in warnings[0]
    assert "'mlp' of epsilon is never reached" in warnings[1]


def test_models_and_files_that_are_missing_or_cut_short(llama: Suite, tmp_path: Path) -> None:
    (error,) = found(examine(with_expert(llama, tmp_path / "nowhere"), tmp_path), "error")
    assert f"{tmp_path / 'nowhere'} must be a folder" in error
    expert = copy(llama, tmp_path)
    file = expert / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1000])
    (error,) = found(examine(with_expert(llama, expert), tmp_path), "error")
    assert f"{expert} cannot be read: {file} must be a whole safetensors file" in error
    file.unlink()
    (error,) = found(examine(with_expert(llama, expert), tmp_path), "error")
    assert "Unable to find model files" in error
    file.write_bytes(whole)
    (expert / "config.json").unlink()
    (error,) = found(examine(with_expert(llama, expert), tmp_path), "error")
    assert "must hold config.json" in error


def test_experts_that_are_the_base_and_experts_of_another(llama: Suite, tmp_path: Path) -> None:
    twin = Path(shutil.copytree(llama.base.path, tmp_path / "twin"))
    (error,) = found(examine(with_expert(llama, twin), tmp_path), "error")
    assert f"{twin} equals the base in every tensor" in error
    unrelated = make_suite("llama", tmp_path / "unrelated", experts=1, seed=7, update=Update.EVEN, scale=SMALL)
    (error,) = found(examine(with_expert(llama, unrelated.experts[0].path), tmp_path), "error")
    assert "is no fine-tune of the base" in error


def test_one_changed_tensor_makes_an_expert(llama: Suite, tmp_path: Path) -> None:
    expert = Path(shutil.copytree(llama.base.path, tmp_path / "expert"))
    with edit_tensors(expert / "model.safetensors") as tensors:
        tensors["model.norm.weight"][3] += 0.5
    assert examine(with_expert(llama, expert), tmp_path).findings == ()


def test_configurations_that_differ(llama: Suite, tmp_path: Path) -> None:
    expert = copy(llama, tmp_path)
    edit_config(expert, num_attention_heads=8)
    (error,) = found(examine(with_expert(llama, expert), tmp_path), "error")
    assert "must have the base's num_attention_heads 4; got 8" in error
    edit_config(expert, num_attention_heads=4, hidden_act="gelu")
    (warning,) = found(examine(with_expert(llama, expert), tmp_path), "warning")
    assert "hidden_act gelu where the base has silu" in warning
    edit_config(expert, hidden_act="silu", architectures=["MistralForCausalLM"])
    (error,) = found(examine(with_expert(llama, expert), tmp_path), "error")
    assert "the base's architecture LlamaForCausalLM; got MistralForCausalLM" in error


def test_configurations_that_only_look_different(llama: Suite, tmp_path: Path) -> None:
    """As versions of transformers write them before 5 and since, and with defaults left out."""
    expert = copy(llama, tmp_path)
    for spelling in (
        {"rope_theta": 10000.0, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {},
    ):
        file = expert / "config.json"
        kept = {key: value for key, value in json.loads(file.read_text()).items() if not key.startswith("rope")}
        file.write_text(json.dumps(kept | spelling))
        assert examine(with_expert(llama, expert), tmp_path).findings == ()
    edit_config(expert, rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})
    warnings = "".join(found(examine(with_expert(llama, expert), tmp_path), "warning"))
    assert "rope_parameters.rope_theta 500000.0 where the base has 10000.0" in warnings
    assert "rope_parameters.rope_type linear where the base has default" in warnings
    assert "rope_parameters.factor 2.0 where the base has None" in warnings


@pytest.mark.parametrize("command", ["check", "merge"])
def test_fewer_experts_in_a_mixture(command: str, tmp_path: Path) -> None:
    """mergekit stacks them when it reads the model, so that no header has the shape."""
    suite = make_suite("mixtral", tmp_path / "models", experts=2, update=Update.EVEN, scale=SMALL)
    expert = suite.experts[0].path
    with edit_tensors(expert / "model.safetensors") as tensors:
        for name in [name for name in tensors if ".experts.3." in name]:
            del tensors[name]
    file = write(document(suite), tmp_path / "recipe.yml")
    result = CliRunner().invoke(main, [command, str(file), *([str(tmp_path / "out")] if command == "merge" else [])])
    assert result.exit_code == 1
    assert f"{expert} has shapes other than the base's: " in result.output
    assert "experts.gate_up_proj (3, 96, 32) for (4, 96, 32)" in result.output
    assert not (tmp_path / "out").exists()
    edit_config(expert, num_local_experts=3)
    errors = "".join(found(examine(document(suite), tmp_path), "error"))
    assert f"{expert} must have the base's num_local_experts 4; got 3" in errors


def test_a_definition_that_fits_no_model(tmp_path: Path) -> None:
    """mergekit's of Whisper asks for `model.decoderembed_tokens.weight`."""
    suite = make_suite("whisper", tmp_path / "models", experts=2, update=Update.EVEN, scale=SMALL)
    (error,) = found(examine(document(suite), tmp_path), "error")
    assert "asks for model.decoderembed_tokens.weight" in error
    assert "which no model has | It does not fit these models: merge their files with mergekit-pytorch" in error


def slices(suite: Suite, *sources: tuple[Path, int, int]) -> dict[str, Any]:
    parts = [{"model": str(model), "layer_range": [first, end]} for model, first, end in sources]
    recipe = document(suite, slices=[{"sources": parts}])
    del recipe["models"]
    return recipe


def test_layers_of_slices_that_are_not_the_base_s(llama: Suite, tmp_path: Path) -> None:
    base, (one, two) = llama.base.path, [expert.path for expert in llama.experts]
    recipe = slices(llama, (base, 0, 2), (one, 1, 3), (two, 0, 2))
    examination = examine(recipe, tmp_path)
    assert found(examination, "error") == []
    (warning,) = found(examination, "warning")
    assert f"{one} has other layers than the base in slices" in warning
    assert "give both the same layer_range" in warning


def test_an_expert_that_is_the_base_of_a_slice(llama: Suite, tmp_path: Path) -> None:
    base, (one, two) = llama.base.path, [expert.path for expert in llama.experts]
    recipe = slices(llama, (base, 0, 3), (one, 0, 3), (two, 0, 3))
    recipe["slices"][0]["base_model"] = str(one)
    assert found(examine(recipe, tmp_path), "error") == []


def test_tensors_that_are_missing_or_of_another_shape(llama: Suite, tmp_path: Path) -> None:
    expert = copy(llama, tmp_path)
    with edit_tensors(expert / "model.safetensors") as tensors:
        gone = tensors.pop("model.layers.1.mlp.up_proj.weight")
    (error,) = found(examine(with_expert(llama, expert), tmp_path), "error")
    assert "lacks model.layers.1.mlp.up_proj.weight" in error
    with edit_tensors(expert / "model.safetensors") as tensors:
        tensors["model.layers.1.mlp.up_proj.weight"] = gone[:-1].clone()
    (error,) = found(examine(with_expert(llama, expert), tmp_path), "error")
    rows, columns = gone.shape
    assert f"({rows - 1}, {columns}) for ({rows}, {columns})" in error


def test_vocabularies_that_differ(llama: Suite, tmp_path: Path) -> None:
    base = Path(shutil.copytree(llama.base.path, tmp_path / "base"))
    expert = copy(llama, tmp_path)
    save_tokenizer(base, 96)
    save_tokenizer(expert, 95, added=["<new>"])
    recipe = document(llama, base_model=str(base), models=[{"model": str(expert)}])
    (warning,) = found(examine(recipe, tmp_path), "warning")
    assert "1 tokens more, 1 fewer, 0 with another number" in warning
    assert "tokenizer: {source: base}" in warning
    assert found(examine(recipe | {"tokenizer": {"source": "base"}}, tmp_path), "warning") == []


def test_rows_beyond_the_bases_vocabulary_need_a_tokenizer(llama: Suite, tmp_path: Path) -> None:
    expert = copy(llama, tmp_path)
    with edit_tensors(expert / "model.safetensors") as tensors:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat([tensors[name], tensors[name][:1]])
    (error,) = found(examine(with_expert(llama, expert), tmp_path), "error")
    assert "has a vocabulary of another size" in error
    assert "tokenizer: {source: base}" in error


def test_settings_that_cost_quality(llama: Suite, tmp_path: Path) -> None:
    recipe = document(llama, dtype="bfloat16", parameters={"embeddings": "ace"})
    tables, precision = sorted(found(examine(recipe, tmp_path), "warning"), key=lambda text: "float32" in text)
    assert "dtype: float32 and out_dtype: bfloat16" in precision
    assert "model.embed_tokens.weight, lm_head.weight: embeddings: ace merges an embedding table" in tables


def test_conv1d_layers_want_their_input_axis_first(tmp_path: Path) -> None:
    suite = make_suite("gpt2", tmp_path, experts=2, update=Update.EVEN, scale=SMALL)
    assert ["(Conv1D)" in text for text in found(examine(document(suite, parameters={}), tmp_path), "warning")] == [
        True
    ]
    assert ["as the authors" in text for text in found(examine(document(suite), tmp_path), "hint")] == [True]
    filters = [{"filter": name, "value": "first"} for name in ("c_attn", "c_proj", "c_fc")]
    turned = document(suite, parameters={"input_axis": [*filters, {"value": "last"}]})
    assert examine(turned, tmp_path).findings == ()


def test_an_input_axis_first_that_does_not_belong(llama: Suite, tmp_path: Path) -> None:
    (warning,) = found(examine(document(llama, parameters={"input_axis": "first"}), tmp_path), "warning")
    assert "though this family stores its matrices [out, in]" in warning


def test_an_adapter_in_the_place_of_a_model_is_one_error_with_the_right_spelling(llama: Suite, tmp_path: Path) -> None:
    adapter = add_adapter(llama.base.path, tmp_path / "a", rank=2, targets=["q_proj"], seed=0)
    recipe = with_expert(llama, adapter)
    (error,) = found(examine(recipe, tmp_path), "error")
    assert f"{adapter} is an adapter, and the recipe takes it for a model" in error
    assert f"Write {llama.base.path}+{adapter}" in error


def test_an_empty_recipe_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "recipe.yml").write_text("# nothing yet\n")
    (error,) = found(check_recipe(tmp_path / "recipe.yml"), "error")
    assert "must hold a mapping with merge_method and models; it is empty" in error


def test_adapters_are_checked_without_being_merged(llama: Suite, tmp_path: Path) -> None:
    adapters = [add_adapter(llama.base.path, tmp_path / f"a{t}", rank=2, targets=["q_proj"], seed=t) for t in range(2)]
    recipe = document(llama, models=[{"model": f"{llama.base.path}+{adapter}"} for adapter in adapters])
    (error,) = found(examine(recipe, tmp_path), "error")
    assert "--lora-merge-cache" in error
    assert "--adapter" in error
    assert all(str(adapter) in error for adapter in adapters)
    (hint,) = found(examine(recipe, tmp_path), "hint")
    assert "--lora-merge-dtype float32" in hint
    cache = tmp_path / "cache"
    examination = examine(recipe, tmp_path, lora_merge_cache=str(cache), lora_merge_dtype="float32")
    assert examination.findings == ()
    assert examination.cost is not None
    assert not cache.exists()


def test_an_adapter_of_another_base(llama: Suite, tmp_path: Path) -> None:
    adapter = add_adapter(llama.base.path, tmp_path / "adapter", rank=2, targets=["q_proj"])
    other = Path(shutil.copytree(llama.base.path, tmp_path / "other"))
    recipe = document(llama, base_model=str(other), models=[{"model": f"{other}+{adapter}"}])
    (warning,) = found(
        examine(recipe, tmp_path, lora_merge_cache=str(tmp_path / "cache"), lora_merge_dtype="float32"), "warning"
    )
    assert "was trained on" in warning


def test_mergekits_own_methods_are_checked_too(llama: Suite, tmp_path: Path) -> None:
    recipe = document(llama, merge_method="ties", parameters={"densty": 0.5})
    examination = examine(recipe, tmp_path)
    unknown, missing = found(examination, "error")
    assert "Did you mean density?" in unknown
    assert "Missing required parameter weight" in missing
    recipe["parameters"] = {"density": 0.5, "weight": 1.0}
    examination = examine(recipe, tmp_path)
    assert examination.findings == ()
    assert examination.cost is not None
    assert examination.cost.seconds is None


def test_a_device_that_is_not_here_is_answered_for(llama: Suite, tmp_path: Path) -> None:
    """A recipe may be checked on another machine than that of the merge."""
    examination = examine(document(llama), tmp_path, device="cuda", read_to_gpu=True)
    assert found(examination, "error") == []
    assert ["this machine has no device cuda" in text for text in found(examination, "hint")] == [True]
    assert examination.cost is not None
    assert examination.cost.seconds is None
    assert examination.cost.workspace > 0
    (error,) = found(examine(document(llama), tmp_path, device="gpu9"), "error")
    assert "--device must be a device of torch's" in error


@pytest.mark.parametrize("flags", [["--cuda"], ["--multi-gpu"], ["--device", "cuda"]])
def test_merge_says_that_the_device_is_missing(flags: list[str], llama: Suite, tmp_path: Path) -> None:
    file = write(document(llama), tmp_path / "recipe.yml")
    result = CliRunner().invoke(main, ["merge", str(file), str(tmp_path / "out"), *flags])
    assert result.exit_code == 1
    assert f"{' '.join(flags)}: torch" in result.output
    assert "Leave the option out" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("weights", "where"),
    [
        (0, "every tensor"),
        ([{"filter": "mlp", "value": 0}, {"value": 1}], "model.layers.0.mlp.up_proj.weight and 8 more tensors"),
    ],
)
def test_weights_that_are_all_0_leave_nothing(weights: Any, where: str, llama: Suite, tmp_path: Path) -> None:
    (error,) = found(examine(document(llama, parameters={"weight": weights}), tmp_path), "error")
    assert f"every expert has weight 0 in {where}" in error
    recipe = document(llama, merge_method="task_arithmetic", parameters={"weight": 0})
    assert ["every expert has weight 0" in text for text in found(examine(recipe, tmp_path), "warning")] == [True]
    models = [{"model": str(e.path), "parameters": {"weight": t}} for t, e in enumerate(llama.experts)]
    assert examine(document(llama, models=models), tmp_path).findings == ()


def test_a_shard_is_so_many_bytes(llama: Suite, tmp_path: Path) -> None:
    small = examine(document(llama, dtype="float64"), tmp_path, out_shard_size=100_000).cost
    smaller = examine(document(llama, dtype="float64"), tmp_path, out_shard_size=50_000).cost
    assert small is not None
    assert smaller is not None
    assert small.memory - smaller.memory == 50_000


@pytest.mark.parametrize(
    ("token", "words"),
    [
        ("_orig_mod.", "which torch.compile puts there"),
        ("module.", "which DataParallel puts there"),
        ("policy.", "its names begin with 'policy.'"),
    ],
)
def test_names_that_are_longer_than_they_should_be(token: str, words: str, llama: Suite, tmp_path: Path) -> None:
    expert = copy(llama, tmp_path)
    with edit_tensors(expert / "model.safetensors") as tensors:
        longer = {token + name: tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update(longer)
    (error,) = found(examine(with_expert(llama, expert), tmp_path), "error")
    assert words in error
    assert (f"name.replace({token!r}, '')" in error) == (token != "policy.")
    assert (f"name.removeprefix({token!r})" in error) == (token == "policy.")


def test_layers_beyond_the_end(llama: Suite, tmp_path: Path) -> None:
    models = [str(llama.base.path), str(llama.experts[0].path)]
    sources = [{"model": model, "layer_range": [1, 4]} for model in models]
    recipe = {"merge_method": "ace", "base_model": models[0], "slices": [{"sources": sources}]}
    errors = found(examine(recipe, tmp_path), "error")
    assert len(errors) == 2
    assert f"layer_range must end at 3, the number of layers of {models[1]}, or before; got [1, 4]" in errors[1]


def test_buffers_that_differ_stop_mergekit(llama: Suite, tmp_path: Path) -> None:
    models = []
    for number, model in enumerate([llama.base, *llama.experts]):
        folder = Path(shutil.copytree(model.path, tmp_path / str(number)))
        with edit_tensors(folder / "model.safetensors") as tensors:
            tensors["model.norm.weight"] = torch.tensor([number, 7])
        models.append(str(folder))
    recipe = document(llama, base_model=models[0], models=[{"model": model} for model in models[1:]])
    assert [
        "model.norm.weight must be equal in all models" in text for text in found(examine(recipe, tmp_path), "error")
    ] == [True]


def test_a_chat_template_that_only_experts_have(llama: Suite, tmp_path: Path) -> None:
    base = Path(shutil.copytree(llama.base.path, tmp_path / "base"))
    expert = copy(llama, tmp_path)
    for folder in (base, expert):
        save_tokenizer(folder, 96)
    recipe = with_expert(llama, expert) | {"base_model": str(base)}
    assert found(examine(recipe, tmp_path), "warning") == []
    (expert / "chat_template.jinja").write_text("{{ messages }}")
    (warning,) = found(examine(recipe, tmp_path), "warning")
    assert f"{expert} have a chat template and the base has none" in warning
    assert "chat_template: auto" in warning
    assert found(examine(recipe | {"chat_template": "auto"}, tmp_path), "warning") == []
    (base / "chat_template.jinja").write_text("{{ messages }}")
    assert found(examine(recipe, tmp_path), "warning") == []


def test_an_expert_that_ends_with_another_token(llama: Suite, tmp_path: Path) -> None:
    expert = copy(llama, tmp_path)
    file = expert / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [2, 7]}))
    (warning,) = found(examine(with_expert(llama, expert), tmp_path), "warning")
    assert f"{expert} ends with eos_token_id 2, 7 where the base ends with 2" in warning
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": 2}))
    assert examine(with_expert(llama, expert), tmp_path).findings == ()


def test_a_padded_table_is_cut_to_its_tokens(llama: Suite, tmp_path: Path) -> None:
    base = Path(shutil.copytree(llama.base.path, tmp_path / "base"))
    expert = copy(llama, tmp_path)
    for folder in (base, expert):
        save_tokenizer(folder, 90)
    models = [{"model": str(expert)}]
    recipe = document(llama, base_model=str(base), models=models, tokenizer={"source": "base"})
    (warning,) = found(examine(recipe, tmp_path), "warning")
    assert "has 96 rows in the base for 90 tokens: the tokenizer source base cuts it to 90" in warning
    assert "pad_to_multiple_of: 32" in warning
    recipe["tokenizer"] = {"source": "base", "pad_to_multiple_of": 32}
    assert found(examine(recipe, tmp_path), "warning") == []


def test_architectures_mixed_by_chance(llama: Suite, tmp_path: Path) -> None:
    expert = copy(llama, tmp_path)
    edit_config(expert, architectures=["MistralForCausalLM"], model_type="mistral")
    (warning,) = found(examine(with_expert(llama, expert), tmp_path, allow_crimes=True), "warning")
    assert f"{expert} is a MistralForCausalLM and the base a LlamaForCausalLM: mergekit-yaml takes" in warning
    assert "override_architecture: LlamaForCausalLM" in warning
    entry = {"model": {"path": str(expert)}, "override_architecture": "LlamaForCausalLM"}
    models = [{"model": entry}, {"model": str(llama.experts[1].path)}]
    assert found(examine(document(llama, models=models), tmp_path, allow_crimes=True), "warning") == []


@pytest.mark.parametrize(
    ("base_dtype", "storage"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float16, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("converted_back", [False, True])
def test_an_expert_that_is_the_base_stored_more_coarsely(
    base_dtype: torch.dtype, storage: torch.dtype, converted_back: bool, llama: Suite, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(llama.base.path, tmp_path / "base"))
    with edit_tensors(base / "model.safetensors") as tensors:
        tensors.update({name: tensor.to(base_dtype) for name, tensor in tensors.items()})
    expert = Path(shutil.copytree(base, tmp_path / "expert"))
    with edit_tensors(expert / "model.safetensors") as tensors:
        coarse = {name: tensor.to(storage) for name, tensor in tensors.items()}
        tensors.update({name: tensor.float() if converted_back else tensor for name, tensor in coarse.items()})
    recipe = with_expert(llama, expert, base_model=str(base), dtype="float32")
    (error,) = found(examine(recipe, tmp_path), "error")
    assert f"{expert} is the base, once stored as {str(storage).removeprefix('torch.')}" in error
    with edit_tensors(expert / "model.safetensors") as tensors:  # one vector that was trained makes it an expert
        tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    assert found(examine(recipe, tmp_path), "error") == []


def test_an_expert_that_the_base_was_rounded_from(llama: Suite, tmp_path: Path) -> None:
    base = Path(shutil.copytree(llama.base.path, tmp_path / "base16"))
    with edit_tensors(base / "model.safetensors") as tensors:
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})
    (error,) = found(examine(with_expert(llama, llama.base.path, base_model=str(base)), tmp_path), "error")
    assert f"the base is {llama.base.path}, once stored as bfloat16" in error
    assert found(examine(with_expert(llama, copy(llama, tmp_path), base_model=str(base)), tmp_path), "error") == []


def test_fine_tunes_stored_more_coarsely_are_experts(llama: Suite, tmp_path: Path) -> None:
    expert = copy(llama, tmp_path)
    with edit_tensors(expert / "model.safetensors") as tensors:
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})
    assert found(examine(with_expert(llama, expert), tmp_path), "error") == []


def test_a_folder_that_is_listed_twice_under_two_names(llama: Suite, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(llama.experts[0].path)
    models = [{"model": str(link)}, {"model": str(llama.experts[0].path)}]
    assert found(examine(document(llama, models=models), tmp_path), "warning") == [
        "models[1] and models[0] are the same folder, which counts twice | Keep one of them, or set its weight."
    ]


def test_a_tokenizer_source_that_is_not_there(llama: Suite, tmp_path: Path) -> None:
    errors = found(examine(document(llama, tokenizer_source=str(tmp_path / "nowhere")), tmp_path), "error")
    assert f"the tokenizer's source {tmp_path / 'nowhere'} must be a folder; there is none" in "\n".join(errors)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"models": [{"weight": 0.0}, {"weight": 0.0}]}, "every expert has weight 0 in every tensor"),
        ({"shape": True}, "must have the base's hidden_size"),
        ({"layers": [0, 9]}, "layer_range must end at 3, the number of layers of"),
        ({"row": True}, "has shapes other than the base's: model.norm.weight (15,) for (16,)"),
    ],
)
@pytest.mark.parametrize("command", ["merge", "inspect"])
def test_other_commands_stop_for_what_check_finds(
    command: str, entries: dict[str, Any], words: str, llama: Suite, tmp_path: Path
) -> None:
    """Before a tensor is merged, in the words of the check."""
    expert = copy(llama, tmp_path)
    recipe = with_expert(llama, expert)
    if "models" in entries:
        for model, parameters in zip(recipe["models"], entries["models"], strict=True):
            model["parameters"] = parameters
    if "shape" in entries:
        edit_config(expert, hidden_size=8)
    if "layers" in entries:
        models = [str(llama.base.path), str(expert)]
        sources = [{"model": model, "layer_range": entries["layers"]} for model in models]
        recipe = {"merge_method": "ace", "base_model": models[0], "slices": [{"sources": sources}]}
    if "row" in entries:
        with edit_tensors(expert / "model.safetensors") as tensors:
            width = len(tensors["model.norm.weight"])
            tensors["model.norm.weight"] = tensors["model.norm.weight"][1:].clone()
        words = words.replace("15", str(width - 1)).replace("16", str(width))
        if command == "inspect":  # which goes on with the tensors that can be merged
            words = "model.norm.weight cannot be merged"
    arguments = [command, str(write(recipe, tmp_path / "recipe.yml"))]
    result = CliRunner().invoke(main, [*arguments, *([str(tmp_path / "out")] if command == "merge" else [])])
    assert result.exit_code == 1
    assert words in result.output
    assert not (tmp_path / "out").exists()


def test_what_mergekit_does_not_read_is_said_by_every_command(llama: Suite, tmp_path: Path) -> None:
    recipe = write(document(llama, lamda=2), tmp_path / "recipe.yml")
    recipe.write_text(recipe.read_text() + "dtype: float32\ndtype: float32\n")
    for arguments in (["merge", str(recipe), str(tmp_path / "out")], ["inspect", "--fast", str(recipe)]):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
        assert "warning: mergekit does not read 'lamda' in the recipe" in result.output
        assert "warning: dtype stands twice in one mapping" in result.output
