"""`mergekit-ace moments` on small checkpoints, against the inputs of their layers, recorded by hooks."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import normalizers
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from mergekit_ace.moments.index import MomentsIndex, read_index
from tests.checkpoints import edit_tensors
from tests.moments.conftest import Make, Scene


def moment(folder: Path, index: MomentsIndex, expert: str, tensor: str) -> Tensor:
    entry = index.experts[expert]
    factor = load_file(folder / entry.file)[index.tensors[tensor].input].double()
    return factor.T @ factor


@torch.no_grad()
def by_hand(model: torch.nn.Module, base: Path, prompts: Path, module: str) -> Tensor:
    """The mean product of the module's inputs over every token of every line."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows: list[Tensor] = []
    with_hook = model.get_submodule(module)
    handle = with_hook.register_forward_pre_hook(lambda _, args: rows.append(args[0][0]))
    for line in prompts.read_text().splitlines():
        model(**tokenizer(line, return_tensors="pt"))
    handle.remove()
    together = torch.cat(rows).double()
    return together.T @ together / len(together)


def assert_moment(measured: Tensor, expected: Tensor) -> None:
    """Equal up to the rounding of the factors to bfloat16, 2^-8 of each entry."""
    assert float((measured - expected).norm()) < 0.01 * float(expected.norm())


@pytest.mark.parametrize("by", ["base", "expert"])
def test_the_moments_are_those_of_the_layers_inputs(scene: Scene, by: str) -> None:
    prompts = [scene.prompts("a.txt"), scene.prompts("b.txt", start=40, lines=4)]
    result = scene.measure("--prompts", f"expert0={prompts[0]}", "--prompts", f"expert1={prompts[1]}", "--by", by)
    assert result.exit_code == 0, result.output
    assert "expert0: 54 tokens" in result.output
    folder = scene.folder / "moments"
    index = read_index(folder)
    assert index.by == by
    assert len(index.tensors) == 21
    assert (index.experts["expert1"].inputs["model.layers.0.self_attn.o_proj"].prompts) == 4
    for place, file in enumerate(prompts):
        run = scene.suite.base if by == "base" else scene.suite.experts[place]
        model = AutoModelForCausalLM.from_pretrained(run.path)
        for module in ("model.layers.0.self_attn.v_proj", "model.layers.2.mlp.down_proj"):
            expected = by_hand(model, scene.suite.base.path, file, module)
            assert_moment(moment(folder, index, f"expert{place}", f"{module}.weight"), expected)


def test_nothing_of_the_prompts_is_stored(scene: Scene) -> None:
    """No text, no token, no digest of them; and of the unfinished folder nothing is left."""
    assert scene.measure("--prompts", f"expert0={scene.prompts('a.txt')}").exit_code == 0
    folder = scene.folder / "moments"
    assert sorted(file.name for file in folder.iterdir()) == ["expert0.safetensors", "moments.json"]
    assert not (scene.folder / "moments.partial").exists()
    index = json.loads((folder / "moments.json").read_text())
    assert set(index) == {"format", "by", "base", "tensors", "experts"}
    assert set(index["experts"]["expert0"]) == {"model", "file", "inputs", "weights"}
    assert b"word" not in (folder / "moments.json").read_bytes() + (folder / "expert0.safetensors").read_bytes()


def test_tokens_are_sampled_spread_over_the_prompts_and_by_the_seed(scene: Scene) -> None:
    prompts = scene.prompts("a.txt", lines=12)
    names = ("one", "again", "other")
    for name, seed in zip(names, (1, 1, 2), strict=True):
        arguments = ("--prompts", f"expert0={prompts}", "--tokens", 40, "--random-seed", seed)
        assert scene.measure(*arguments, out=name).exit_code == 0
    entries = [read_index(scene.folder / name).experts["expert0"].inputs for name in names]
    assert all(entry.tokens == 40 and entry.prompts == 12 for entry in entries[0].values())
    files = [(scene.folder / name / "expert0.safetensors").read_bytes() for name in names]
    assert files[0] == files[1] != files[2]


def test_a_stopped_run_is_continued(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first expert is not run again, unless its prompts have changed."""
    from mergekit_ace.collecting import collect

    arguments = []
    for expert, start in (("expert0", 0), ("expert1", 40)):
        arguments += ["--prompts", f"{expert}={scene.prompts(f'{expert}.txt', start=start)}"]
    run, ran = collect.sample_inputs, []

    def stopping(model: object, sampler: object, prompts: list[object], device: object) -> object:
        ran.append(prompts)
        if len(ran) == 2:
            raise KeyboardInterrupt
        return run(model, sampler, prompts, device)  # type: ignore[arg-type]

    monkeypatch.setattr(collect, "sample_inputs", stopping)
    assert scene.measure(*arguments).exit_code != 0
    assert not (scene.folder / "moments").exists()
    assert scene.measure(*arguments).exit_code == 0
    assert len(ran) == 3
    monkeypatch.undo()
    assert scene.measure(*arguments, out="whole").exit_code == 0
    for file in (scene.folder / "whole").iterdir():
        assert file.read_bytes() == (scene.folder / "moments" / file.name).read_bytes()


def test_a_model_that_is_offloaded_gives_the_same_moments(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers on the disk: their weights are on no device until they run."""
    from mergekit_ace.collecting import model as models

    prompts = scene.prompts("a.txt")
    assert scene.measure("--prompts", f"expert0={prompts}", out="whole").exit_code == 0
    automatic = models.get_auto_cls

    def with_layers_on_the_disk(name: str) -> Any:
        loader = automatic(name)
        real = loader.from_pretrained

        def from_pretrained(*arguments: Any, **options: Any) -> Any:
            assert options["device_map"] == "auto"
            layers = {f"model.layers.{layer}": "disk" for layer in (1, 2)}
            places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
            others = {"model.rotary_emb": "cpu"}
            return real(*arguments, **options | {"device_map": places | others | layers})

        return SimpleNamespace(from_pretrained=from_pretrained)

    monkeypatch.setattr(models, "get_auto_cls", with_layers_on_the_disk)
    result = scene.measure("--prompts", f"expert0={prompts}", "--offload", out="offloaded")
    assert result.exit_code == 0, result.output
    for file in (scene.folder / "whole").iterdir():
        assert file.read_bytes() == (scene.folder / "offloaded" / file.name).read_bytes()


def test_conv1d_is_measured_along_its_first_axis(make: Make) -> None:
    scene = make("gpt2")
    prompts = scene.prompts("a.txt")
    assert scene.measure("--prompts", f"expert0={prompts}").exit_code == 0
    index = read_index(scene.folder / "moments")
    name = "transformer.h.1.mlp.c_proj"
    assert index.tensors[f"{name}.weight"].input_first
    model = AutoModelForCausalLM.from_pretrained(scene.suite.base.path)
    expected = by_hand(model, scene.suite.base.path, prompts, name)
    assert_moment(moment(scene.folder / "moments", index, "expert0", f"{name}.weight"), expected)


def test_modules_called_otherwise_than_the_tensors_are_found_by_their_weight(make: Make) -> None:
    """RoBERTa's tensors have a prefix that the modules of its body have not."""
    scene = make("roberta")
    prompts = scene.prompts("a.txt")
    result = scene.measure("--prompts", f"expert0={prompts}")
    assert result.exit_code == 0, result.output
    index = read_index(scene.folder / "moments")
    name = next(name for name in index.tensors if name.endswith("layer.1.output.dense.weight"))
    model = AutoModel.from_pretrained(scene.suite.base.path)
    expected = by_hand(model, scene.suite.base.path, prompts, "encoder.layer.1.output.dense")
    assert_moment(moment(scene.folder / "moments", index, "expert0", name), expected)


def test_a_text_is_cut_to_what_an_encoder_takes(make: Make) -> None:
    """RoBERTa has two positions less than its configuration states; its tokenizer says how many tokens it takes."""
    scene = make("roberta")
    config = json.loads((scene.suite.base.path / "config.json").read_text())
    longest = config["max_position_embeddings"] - config["pad_token_id"] - 1
    tokenizer = AutoTokenizer.from_pretrained(scene.suite.base.path)
    tokenizer.model_max_length = longest
    tokenizer.save_pretrained(scene.suite.base.path)
    prompts = scene.prompts("a.txt", lines=1, words=longest + 5)
    result = scene.measure("--prompts", f"expert0={prompts}")
    assert result.exit_code == 0, result.output
    assert f"expert0: {longest} tokens" in result.output


def test_stacked_experts_keep_their_estimates_and_are_named(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    scene = make("qwen3-moe")
    caplog.set_level(logging.INFO)
    result = scene.measure("--prompts", f"expert0={scene.prompts('a.txt')}", "-v")
    assert result.exit_code == 0, result.output
    assert "keep the estimate from their task vectors" in result.output
    assert "model.layers.0.mlp.experts.down_proj" in caplog.text
    index = read_index(scene.folder / "moments")
    assert "model.layers.0.self_attn.q_proj.weight" in index.tensors
    assert not any("experts" in name for name in index.tensors)


def test_a_chat_template_is_used(scene: Scene) -> None:
    """Every prompt gains the tokens of the template."""
    file = scene.suite.base.path / "chat_template.jinja"
    file.write_text(
        "{% for m in messages %}word1 word2 {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}word3{% endif %}"
    )
    try:
        result = scene.measure("--prompts", f"expert0={scene.prompts('a.txt')}")
    finally:
        file.unlink()
    assert "expert0: 72 tokens" in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--prompts", "expert7={file}"), "--prompts expert7: the name must be that of one expert of the recipe"),
        (("--prompts", "{file}"), "must be NAME=FILE"),
        (("--prompts", "expert0={file}", "--prompts", "expert0={file}"), "expert0 must be given once"),
        (("--prompts", "expert0={folder}/none.txt"), "none.txt: the prompts cannot be read"),
        (
            ("--prompts", "expert0={short}"),
            "expert0: its prompts must have at least 32 tokens in all; got 4 in 1 prompt",
        ),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(scene: Scene, arguments: tuple[str, ...], words: str) -> None:
    files = {
        "file": scene.prompts("a.txt"),
        "short": scene.prompts("short.txt", lines=1, words=4),
        "folder": scene.folder,
    }
    result = scene.measure(*(argument.format(**files) for argument in arguments))
    assert result.exit_code != 0
    assert words in " ".join(result.output.split())
    assert not (scene.folder / "moments").exists()


def test_a_prompt_without_a_token_is_named(scene: Scene) -> None:
    """The tokenizer drops a character that is no white space."""
    tokenizer = AutoTokenizer.from_pretrained(scene.suite.base.path)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("_", "")
    tokenizer.save_pretrained(scene.suite.base.path)
    prompts = scene.folder / "a.jsonl"
    prompts.write_text('{"prompt": "word1 word2"}\n{"text": "__"}')
    result = scene.measure("--prompts", f"expert0={prompts}")
    assert f"{prompts} line 2: the prompt must have at least one token; it has none" in result.output


def test_activations_that_are_not_finite_name_the_layer_and_the_prompt(scene: Scene) -> None:
    prompts = scene.prompts("a.txt")
    with edit_tensors(scene.suite.base.path / "model.safetensors") as tensors:
        tensors["model.layers.1.input_layernorm.weight"].fill_(float("inf"))
    result = scene.measure("--prompts", f"expert0={prompts}")
    assert result.exit_code == 1
    assert f"model.layers.1.self_attn.q_proj: its inputs must be finite; {prompts} line 1 gives NaN" in result.output


def test_a_method_without_moments_is_refused(make: Make) -> None:
    scene = make("llama", method="tsv_m")
    result = scene.measure("--prompts", f"expert0={scene.prompts('a.txt')}")
    assert "merge_method must be one that takes second moments (ace, wudi, actmat); got tsv_m" in result.output


def test_a_folder_that_holds_something_is_kept(scene: Scene) -> None:
    (scene.folder / "moments").mkdir()
    (scene.folder / "moments" / "mine.txt").write_text("mine")
    result = scene.measure("--prompts", f"expert0={scene.prompts('a.txt')}")
    assert "moments must be new or an empty folder" in result.output
    assert (scene.folder / "moments" / "mine.txt").read_text() == "mine"


def test_a_table_that_is_the_head_too_is_measured_where_it_is_merged_as_a_matrix(make: Make) -> None:
    """By the inputs of the head, which are those after the last norm."""
    scene = make("llama-tied")
    document = yaml.safe_load(scene.recipe.read_text())
    scene.recipe.write_text(yaml.safe_dump({**document, "parameters": {"embeddings": "ace"}}))
    prompts = scene.prompts("a.txt")
    result = scene.measure("--prompts", f"expert0={prompts}")
    assert result.exit_code == 0, result.output
    index = read_index(scene.folder / "moments")
    model = AutoModelForCausalLM.from_pretrained(scene.suite.base.path)
    expected = by_hand(model, scene.suite.base.path, prompts, "lm_head")
    assert_moment(moment(scene.folder / "moments", index, "expert0", "model.embed_tokens.weight"), expected)
