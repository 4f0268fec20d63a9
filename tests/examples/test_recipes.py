"""The recipes of `ace`: each is run, and every tensor of its output is the reference's."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import peft
import torch
import transformers
import yaml
from click.testing import CliRunner
from mergekit import merge_methods
from mergekit.merge_methods.api import merge_tensors
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_ace.cli import main
from tests.checkpoints import Family, add_adapter, make_suite, read_tensors, save_tokenizer
from tests.checkpoints.decoders import CONV1D, TABLES
from tests.checkpoints.family import GROUPED, VOCABULARY, causal
from tests.checkpoints.suite import Checkpoint
from tests.commands import mergekit_multi, mergekit_pytorch, mergekit_yaml
from tests.end_to_end.comparison import PUBLISHED, assert_merged, assert_suite_merged, assert_tensor, reference_for
from tests.examples.stand_ins import RECIPES, localized
from tests.reference import Recipe
from tests.zoo.forward import load_and_run


def named(base: str, experts: Sequence[str], folder: Path) -> dict[str, Path]:
    """Names of a recipe and the folders of `make_suite`."""
    return {base: folder / "base", **{name: folder / f"expert{t}" for t, name in enumerate(experts)}}


def test_llama3_instruct(tmp_path: Path) -> None:
    suite = make_suite("llama", tmp_path, dtype=torch.bfloat16)
    models = named(
        "meta-llama/Meta-Llama-3-8B-Instruct",
        (
            "princeton-nlp/Llama-3-Instruct-8B-SimPO",
            "shenzhi-wang/Llama3-8B-Chinese-Chat",
            "VAGOsolutions/Llama-3-SauerkrautLM-8b-Instruct",
        ),
        tmp_path,
    )
    out = mergekit_yaml(localized("llama3-instruct", models, PUBLISHED)[0], tmp_path / "out")
    assert_suite_merged(read_tensors(out), suite, reference_for(suite.family))
    load_and_run(suite.family, out)


def test_qwen_lora(tmp_path: Path) -> None:
    """Adapters of other ranks and target modules: layers with three, two, one and no expert."""
    suite = make_suite("qwen2", tmp_path, experts=1)
    targets = {
        "sql": (4, ["q_proj", "v_proj"]),
        "legal": (8, ["q_proj", "up_proj"]),
        "medical": (16, ["q_proj", "up_proj"]),
    }
    models = {"Qwen/Qwen2.5-7B-Instruct": suite.base.path}
    for seed, (task, (rank, modules)) in enumerate(targets.items()):
        adapter = add_adapter(suite.base.path, tmp_path / task, rank=rank, targets=modules, seed=seed)
        models[f"your-name/qwen2.5-7b-{task}-lora"] = adapter
    cache = tmp_path / "cache"
    flags = ("--lora-merge-cache", str(cache), "--lora-merge-dtype", "float32")
    out = mergekit_yaml(localized("qwen-lora", models, PUBLISHED)[0], tmp_path / "out", *flags)
    experts = [_cached(cache, suite.base.path, models[f"your-name/qwen2.5-7b-{task}-lora"]) for task in targets]
    merged = read_tensors(out)
    assert merged.keys() == read_tensors(suite.base.path).keys()
    assert_merged(merged, suite.base, experts, reference_for(suite.family, weights=(1.0, 1.0, 1.5)))
    load_and_run(suite.family, out)


def test_qwen_lora_to_lora(tmp_path: Path) -> None:
    """The recipe of one adapter adds what that of a full merge adds, and is stored in the recipe's dtype."""
    suite = make_suite("qwen2", tmp_path, experts=1)
    models = {"Qwen/Qwen2.5-7B-Instruct": suite.base.path}
    for seed, (task, targets) in enumerate(
        (("sql", ["q_proj"]), ("legal", ["q_proj", "up_proj"]), ("medical", ["q_proj"]))
    ):
        adapter = add_adapter(suite.base.path, tmp_path / task, rank=2 + seed, targets=targets, seed=seed)
        models[f"your-name/qwen2.5-7b-{task}-lora"] = adapter
    flags = ("--lora-merge-cache", str(tmp_path / "cache"), "--lora-merge-dtype", "float32")
    full = read_tensors(
        mergekit_yaml(localized("qwen-lora", models, {})[0] | {"out_dtype": "float32"}, tmp_path / "full", *flags)
    )
    (document,) = localized("qwen-lora-to-lora", models, {})
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(document))
    result = CliRunner().invoke(main, ["merge", str(tmp_path / "recipe.yml"), str(tmp_path / "one"), "--adapter"])
    assert result.exit_code == 0, result.output
    stored = load_file(tmp_path / "one" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(suite.base.path, dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(model, tmp_path / "one").merge_and_unload().state_dict()
    for name, tensor in full.items():
        change = tensor - suite.base.tensors[name]
        # The factors keep 8 bits.
        assert (merged[name] - tensor).norm() <= 1e-2 * change.norm() + 1e-6


def test_prompts(tmp_path: Path) -> None:
    """The commands of the recipe: moments are measured and merged by, and the merge is another one than without."""
    suite = make_suite("llama", tmp_path, experts=1)
    save_tokenizer(suite.base.path, VOCABULARY)
    models = {"Qwen/Qwen2.5-7B-Instruct": suite.base.path}
    arguments = []
    for seed, task in enumerate(("sql", "legal", "medical")):
        adapter = add_adapter(suite.base.path, tmp_path / f"{task}-lora", rank=4, targets=["q_proj"], seed=seed)
        models[f"your-name/qwen2.5-7b-{task}-lora"] = adapter
        words = [" ".join(f"word{(31 * seed + 5 * line + word) % 90}" for word in range(9)) for line in range(5)]
        (tmp_path / f"{task}.txt").write_text("\n".join(words))
        arguments += ["--prompts", f"{task}-lora={tmp_path / f'{task}.txt'}"]
    (document,) = localized("prompts", models, {})
    assert document.pop("parameters") == {"moments": "moments/"}
    recipe, moments = tmp_path / "recipe.yml", tmp_path / "moments"
    recipe.write_text(yaml.safe_dump(document))
    result = CliRunner().invoke(main, ["moments", str(recipe), "--out", str(moments), *arguments])
    assert result.exit_code == 0, result.output
    flags = ("--lora-merge-cache", str(tmp_path / "cache"), "--lora-merge-dtype", "float32")
    estimated = read_tensors(mergekit_yaml(document, tmp_path / "estimated", *flags))
    document["parameters"] = {"moments": str(moments)}
    measured = read_tensors(mergekit_yaml(document, tmp_path / "measured", *flags))
    differing = {name for name, tensor in measured.items() if not torch.equal(tensor, estimated[name])}
    assert differing == {name for name in measured if "q_proj.weight" in name}


def _cached(cache: Path, base: Path, adapter: Path) -> Checkpoint:
    """What mergekit made of base + adapter."""
    (folder,) = (path for path in cache.iterdir() if adapter.name in path.name and base.name in path.name)
    return Checkpoint(folder, read_tensors(folder))


def test_gpt2_glue(tmp_path: Path) -> None:
    """Sequence classifiers with heads of two and three classes on the body of a language model."""
    suite = make_suite("gpt2", tmp_path)
    tasks = {"cola": 2, "mnli": 3, "sst2": 2}
    models, experts = {"openai-community/gpt2": suite.base.path}, []
    for (task, classes), expert in zip(tasks.items(), suite.experts, strict=True):
        model = transformers.GPT2ForSequenceClassification.from_pretrained(
            expert.path, num_labels=classes, pad_token_id=0
        )
        model.save_pretrained(tmp_path / task)
        models[f"tanganke/gpt2_{task}"] = tmp_path / task
        experts.append(Checkpoint(tmp_path / task, read_tensors(tmp_path / task)))
    out = mergekit_yaml(localized("gpt2-glue", models, PUBLISHED)[0], tmp_path / "out")
    merged = read_tensors(out)
    assert "score.weight" not in merged
    assert_merged(merged, suite.base, experts, reference_for(suite.family, input_first=CONV1D))
    load_and_run(suite.family, out)


def test_clip_vit(tmp_path: Path) -> None:
    """Experts that hold the vision tower alone."""
    suite = make_suite("clip", tmp_path)
    models = {"openai/clip-vit-base-patch32": suite.base.path}
    for task, expert in zip(("sun397", "eurosat", "mnist"), suite.experts, strict=True):
        tower = {name: tensor for name, tensor in read_tensors(expert.path).items() if name.startswith("vision_model.")}
        models[f"tanganke/clip-vit-base-patch32_{task}"] = tmp_path / task
        (tmp_path / task).mkdir()
        save_file(tower, tmp_path / task / "model.safetensors")
    merged = read_tensors(
        mergekit_pytorch(localized("clip-vit", models, PUBLISHED)[0], tmp_path / "out", "--tensor-intersection")
    )
    assert merged.keys() == tower.keys()
    assert_merged(merged, suite.base, suite.experts, reference_for(suite.family))


def test_mlp_only(tmp_path: Path) -> None:
    """Sixteen layers in two slices: filters choose the treatment, gradients the weights and the scale."""
    family = causal("llama-16", transformers.LlamaConfig(**{**GROUPED, "num_hidden_layers": 16}), tables=TABLES)
    suite = make_suite(family, tmp_path, experts=2)
    models = named(
        "meta-llama/Llama-3.2-1B", ("meta-llama/Llama-3.2-1B-Instruct", "your-name/Llama-3.2-1B-code"), tmp_path
    )
    out = mergekit_yaml(localized("mlp-only", models, PUBLISHED)[0], tmp_path / "out")
    merged = read_tensors(out)
    assert merged.keys() == read_tensors(suite.base.path).keys()
    for name, tensor in merged.items():
        assert_tensor(
            name,
            tensor,
            [checkpoint.tensors[name].bfloat16() for checkpoint in (suite.base, *suite.experts)],
            _mlp_only(family, name),
        )
    load_and_run(family, out)


def _mlp_only(family: Family, name: str) -> Recipe:
    """What the recipe says of one tensor: a slice's gradients run from its first layer to its last."""
    layer = int(name.split(".")[2]) if ".layers." in name else None
    depth = 0.0 if layer is None else layer % 8 / 7
    upper = (layer is None and name in ("lm_head.weight", "model.norm.weight")) or (layer is not None and layer >= 8)
    return replace(
        reference_for(family),
        weights=(1.0, 1 + 2 * depth) if upper else None,
        scale=0.8 + 0.2 * depth if "mlp" in name else 0.5,
        averaged=("*.self_attn.*",),
    )


def test_specialists_then_chat(tmp_path: Path) -> None:
    suite = make_suite("mistral", tmp_path, experts=4, dtype=torch.bfloat16)
    specialists = tuple(f"your-name/Mistral-7B-v0.1-{task}" for task in ("maths", "code", "medicine"))
    models = named("mistralai/Mistral-7B-v0.1", (*specialists, "mistralai/Mistral-7B-Instruct-v0.1"), tmp_path)
    out = mergekit_multi(localized("specialists-then-chat", models, PUBLISHED), tmp_path / "out")
    first = read_tensors(tmp_path / "out-between" / "specialists")
    assert_merged(first, suite.base, suite.experts[:3], reference_for(suite.family))
    for name, tensor in read_tensors(out).items():
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        share = 0.3 + 0.4 * layer / 2 if "self_attn" in name else 0.5
        both = [first[name], suite.experts[3].tensors[name]]
        expected = merge_tensors(both, "slerp", base_index=0, parameters={"t": share})
        torch.testing.assert_close(tensor, expected, rtol=1e-2, atol=1e-3)
    load_and_run(suite.family, out)


def test_union_tokenizer(tmp_path: Path) -> None:
    """One expert has two tokens of its own; the output has all of them, and pads to 64."""
    family = causal("mistral-untied", transformers.MistralConfig(**GROUPED, tie_word_embeddings=False), tables=TABLES)
    suite = make_suite(family, tmp_path, experts=2)
    wider = transformers.AutoModelForCausalLM.from_pretrained(suite.experts[0].path)
    wider.resize_token_embeddings(VOCABULARY + 2, mean_resizing=False)
    wider.save_pretrained(tmp_path / "openhermes")
    chat = ["<|im_start|>", "<|im_end|>"]
    for folder in (suite.base.path, suite.experts[1].path):
        save_tokenizer(folder, VOCABULARY)
    save_tokenizer(tmp_path / "openhermes", VOCABULARY, added=chat)
    models = {
        "mistralai/Mistral-7B-v0.1": suite.base.path,
        "teknium/OpenHermes-2.5-Mistral-7B": tmp_path / "openhermes",
        "your-name/Mistral-7B-v0.1-maths": suite.experts[1].path,
    }
    out = mergekit_yaml(localized("union-tokenizer", models, PUBLISHED)[0], tmp_path / "out")
    merged = read_tensors(out)
    hermes = read_tensors(tmp_path / "openhermes")
    for name in TABLES:
        table = merged.pop(name)
        assert table.shape == (128, 32)
        inputs = [t[name][:VOCABULARY].bfloat16() for t in (suite.base.tensors, hermes, suite.experts[1].tensors)]
        assert_tensor(name, table[:VOCABULARY], inputs, reference_for(family))
        torch.testing.assert_close(table[VOCABULARY : VOCABULARY + 2], hermes[name][VOCABULARY:].bfloat16())
    experts = [Checkpoint(tmp_path / "openhermes", hermes), suite.experts[1]]
    assert_merged(merged, suite.base, experts, reference_for(family), torch.bfloat16)
    assert AutoTokenizer.from_pretrained(out).convert_tokens_to_ids(chat) == [VOCABULARY, VOCABULARY + 1]
    load_and_run(family, out)


def test_every_parameter_is_one_that_the_method_knows() -> None:
    """mergekit passes over what a method does not know, so a slip of the pen would go unseen."""
    for recipe in RECIPES.glob("*.yml"):
        for document in yaml.safe_load_all(recipe.read_text()):
            known = {parameter.name for parameter in merge_methods.get(document["merge_method"]).spec.parameters}
            assert set(_parameters(document)) <= known, recipe.name


def _parameters(node: object) -> Iterator[str]:
    """The names under every `parameters:` of a recipe."""
    if isinstance(node, dict):
        yield from node.get("parameters", {})
        node = list(node.values())
    if isinstance(node, list):
        for item in node:
            yield from _parameters(item)


def test_every_recipe_says_when_to_use_it_and_is_tested_here() -> None:
    tested = Path(__file__).read_text() + (Path(__file__).parent / "test_family.py").read_text()
    for recipe in RECIPES.glob("*.yml"):
        if not recipe.name.startswith("demo"):
            assert "\n# Use it " in recipe.read_text() or "\n# Use " in recipe.read_text(), recipe
            assert f'"{recipe.stem}"' in tested, f"{recipe.name} is not run by a test"
