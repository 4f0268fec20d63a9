"""Recipes with `moments`, from prompts to a merged model by the real commands."""

import json
import logging
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from mergekit.options import MergeOptions
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from mergekit_ace.cli import main
from mergekit_ace.matrix.expert import Expert, MeasuredMoment
from mergekit_ace.matrix.merge import merge_by_covariance
from mergekit_ace.matrix.presets import ACE
from mergekit_ace.matrix.stored_task_vectors import StoredTaskVectors
from mergekit_ace.matrix.workload import working_numbers
from mergekit_ace.moments.index import MomentsIndex, read_index
from mergekit_ace.recipe.planning import planned
from mergekit_ace.recipe.reading import read_recipe
from mergekit_ace.recipe.tensor_cost import tensor_cost
from tests.checkpoints import Update, add_adapter, edit_tensors, read_tensors
from tests.moments.conftest import Make, Scene


def merge(scene: Scene, out: str = "merged", *flags: str, moments: str = "moments", **parameters: object) -> Result:
    document = yaml.safe_load(scene.recipe.read_text())
    document["parameters"] = {"moments": str(scene.folder / moments), **parameters}
    recipe = scene.folder / "with-moments.yml"
    recipe.write_text(yaml.safe_dump(document))
    arguments = ["merge", recipe, scene.folder / out, "--no-copy-tokenizer", "--quiet", *flags]
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def measured(scene: Scene, *names: str, **options: object) -> MomentsIndex:
    arguments: list[object] = []
    for start, name in enumerate(names):
        arguments += ["--prompts", f"{name}={scene.prompts(f'{name}.txt', start=31 * start)}"]
    for option, value in options.items():
        arguments += [f"--{option}", value]
    result = scene.measure(*arguments)
    assert result.exit_code == 0, result.output
    return read_index(scene.folder / "moments")


def merged_by_hand(scene: Scene, index: MomentsIndex, name: str) -> Tensor:
    base = scene.suite.base.tensors[name]
    experts = []
    for number, expert in enumerate(scene.suite.experts):
        entry = index.experts.get(f"expert{number}")
        moment = None
        if entry is not None:
            source = index.tensors[name].input
            factor = load_file(scene.folder / "moments" / entry.file)[source]
            found = entry.inputs[source]
            moment = MeasuredMoment(factor=factor, error=found.error, tokens=found.tokens)
        experts.append(Expert(name=str(number), tensor=expert.tensors[name], measured=moment))
    return base + merge_by_covariance(StoredTaskVectors(base, experts), ACE).task_vector


@pytest.mark.parametrize("names", [("expert0", "expert1"), ("expert1",)])
def test_a_merge_by_moments(make: Make, names: tuple[str, ...], caplog: pytest.LogCaptureFixture) -> None:
    """With moments of all experts, or of one: the other keeps its estimate, which is said once."""
    scene = make("llama", update=Update.EVEN, scale=0.1)
    index = measured(scene, *names)
    result = merge(scene)
    assert result.exit_code == 0, result.output
    merged = read_tensors(scene.folder / "merged")
    for name in ("model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        torch.testing.assert_close(merged[name], merged_by_hand(scene, index, name), rtol=0, atol=1e-6)
    said = [record.message for record in caplog.records if "keeps the estimate" in record.message]
    assert len(said) == 2 - len(names)


def test_the_moments_change_the_merge_and_the_folder_may_move(make: Make) -> None:
    scene = make("llama", update=Update.EVEN, scale=0.1)
    measured(scene, "expert0", "expert1")
    assert merge(scene, "one").exit_code == 0
    (scene.folder / "moments").rename(scene.folder / "elsewhere")
    assert merge(scene, "two", moments="elsewhere").exit_code == 0
    assert CliRunner().invoke(main, ["merge", str(scene.recipe), str(scene.folder / "estimated")]).exit_code == 0
    one, two, estimated = (read_tensors(scene.folder / name) for name in ("one", "two", "estimated"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    differing = {name for name in one if not torch.equal(one[name], estimated[name])}
    assert differing == set(read_index(scene.folder / "elsewhere").tensors)


def test_adapters(make: Make) -> None:
    """`base+adapter` experts, measured by the base and by each of them; merged whole, and to an adapter."""
    scene = make("llama")
    targets = ["q_proj", "down_proj"]
    models = []
    for seed, name in enumerate(("french", "steps")):
        adapter = add_adapter(scene.suite.base.path, scene.folder / name, rank=4, targets=targets, seed=seed)
        models.append({"model": f"{scene.suite.base.path}+{adapter}"})
    document = yaml.safe_load(scene.recipe.read_text())
    scene.recipe.write_text(yaml.safe_dump({**document, "models": models}))
    arguments = [f"--prompts=french={scene.prompts('a.txt')}", f"--prompts=steps={scene.prompts('b.txt', start=31)}"]
    for by in ("base", "expert"):
        result = scene.measure(*arguments, "--by", by, out=f"by-{by}")
        assert result.exit_code == 0, result.output
        cache = ("--lora-merge-cache", str(scene.folder / "cache"), "--lora-merge-dtype", "float32")
        result = merge(scene, f"merged-{by}", *cache, moments=f"by-{by}")
        assert result.exit_code == 0, result.output
    one, two = (read_tensors(scene.folder / f"merged-{by}") for by in ("base", "expert"))
    base = read_tensors(scene.suite.base.path)
    for name in base:
        touched = any(target in name for target in targets)
        assert torch.equal(base[name], one[name]) != touched
    assert not torch.equal(one["model.layers.2.mlp.down_proj.weight"], two["model.layers.2.mlp.down_proj.weight"])
    result = merge(scene, "adapter", "--adapter", moments="by-base")
    assert result.exit_code == 0, result.output
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(scene.suite.base.path), scene.folder / "adapter"
    )
    loaded = model.merge_and_unload().state_dict()
    for name in base:
        torch.testing.assert_close(loaded[name], one[name], rtol=0, atol=1e-5)
    result = merge(scene, "refused", "--adapter", moments="by-expert")
    assert "was measured by the experts themselves (--by expert), which cannot be told from others" in result.output


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_recipe_may_read_the_base_in_another_dtype(make: Make, dtype: str) -> None:
    scene = make("llama", update=Update.EVEN, scale=0.1)
    measured(scene, "expert0", "expert1")
    document = yaml.safe_load(scene.recipe.read_text())
    scene.recipe.write_text(yaml.safe_dump({**document, "dtype": dtype}))
    result = merge(scene)
    assert result.exit_code == 0, result.output


def test_the_estimate_of_the_cost_counts_measured_moments(make: Make) -> None:
    """Of few wide rows, which estimates merge by their few rows: measured moments have no such route."""
    scene = make("llama", update=Update.EVEN, scale=0.1)
    index = measured(scene, "expert0", "expert1")
    document = yaml.safe_load(scene.recipe.read_text())
    costs = {}
    for name, moments in (("estimated", ""), ("measured", str(scene.folder / "moments"))):
        file = scene.folder / f"{name}.yml"
        file.write_text(yaml.safe_dump(document | {"parameters": {"moments": moments}} if moments else document))
        with planned(read_recipe(file), MergeOptions()) as plan:
            tensor = next(tensor for tensor in plan.tensors if tensor.name.endswith("k_proj.weight"))
            assert tensor.base is not None
            costs[name] = tensor_cost(plan, tensor, tensor.header(tensor.base))
    m, n = scene.suite.base.tensors[tensor.name].shape
    tokens = index.experts["expert0"].inputs[index.tensors[tensor.name].input].tokens
    assert costs["measured"].workspace == 4 * working_numbers(m, n, 2, measured=True)
    assert costs["measured"].workspace >= 4 * (4 * n * n + 4 * m * n)
    products = 2 * (n * n * (m + min(tokens, n)) / 2 + m * n * n)
    assert costs["measured"].arithmetic.single > products
    assert costs["measured"].arithmetic.single > costs["estimated"].arithmetic.single


def test_conv1d_needs_its_input_axis(make: Make) -> None:
    scene = make("gpt2", update=Update.EVEN, scale=0.1)
    index = measured(scene, "expert0")
    result = merge(scene)
    assert result.exit_code == 1
    assert "its inputs were measured along the first axis; the recipe has input_axis: last" in result.output
    axis = [{"filter": name, "value": "first"} for name in ("c_attn", "c_proj", "c_fc")] + [{"value": "last"}]
    result = merge(scene, input_axis=axis)
    assert result.exit_code == 0, result.output
    assert index.tensors["transformer.h.0.attn.c_proj.weight"].input_first


def change(scene: Scene, checkpoint: Path, name: str = "model.layers.1.self_attn.o_proj.weight") -> None:
    with edit_tensors(checkpoint / "model.safetensors") as tensors:
        tensors[name][3] += 1e-3


@pytest.mark.parametrize("by", ["base", "expert"])
def test_moments_of_other_models_stop_the_merge(scene: Scene, by: str) -> None:
    """Another base, by one row of one layer; an expert of another training, where the expert itself was run."""
    measured(scene, "expert0", by=by)
    change(scene, scene.suite.base.path if by == "base" else scene.suite.experts[0].path)
    result = merge(scene)
    assert result.exit_code == 1
    who = "the base" if by == "base" else "the expert expert0"
    assert f"model.layers.1.self_attn.o_proj.weight of {who} is not the weight that the moments in" in result.output
    assert "Measure them on the models of this recipe" in result.output
    assert not (scene.folder / "merged").exists()


def test_another_expert_under_the_bases_moments_is_no_mismatch(scene: Scene) -> None:
    """The base's activations do not depend on what the expert has learned since."""
    measured(scene, "expert0")
    change(scene, scene.suite.experts[0].path)
    assert merge(scene).exit_code == 0


def damaged_index(folder: Path) -> None:
    (folder / "moments.json").write_text("{}")


def no_index(folder: Path) -> None:
    (folder / "moments.json").unlink()


def truncated(folder: Path) -> None:
    file = folder / "expert0.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def missing(folder: Path) -> None:
    (folder / "expert0.safetensors").unlink()


def not_finite(folder: Path) -> None:
    with edit_tensors(folder / "expert0.safetensors") as tensors:
        tensors["model.layers.0.self_attn.q_proj"][0, 0] = float("nan")


def misshapen(folder: Path) -> None:
    with edit_tensors(folder / "expert0.safetensors") as tensors:
        tensors["model.layers.0.self_attn.q_proj"] = torch.ones(4, 5, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damaged_index, "moments.json must be an index of this version of mergekit-ace; by: Field required"),
        (no_index, "parameter moments must be a folder that mergekit-ace moments wrote; got"),
        (truncated, "expert0.safetensors: the moments cannot be read"),
        (missing, "expert0.safetensors: the moments cannot be read"),
        (not_finite, "the moments of model.layers.0.self_attn.q_proj hold NaN or infinity"),
        (misshapen, "the moments of model.layers.0.self_attn.q_proj must have 32 columns; got shape (4, 5)"),
    ],
)
def test_a_damaged_folder_stops_the_merge(scene: Scene, damage: object, words: str) -> None:
    measured(scene, "expert0")
    damage(scene.folder / "moments")  # type: ignore[operator]
    result = merge(scene)
    assert result.exit_code == 1
    assert words in result.output
    assert not (scene.folder / "merged").exists()


def test_moments_of_no_expert_of_the_recipe_are_refused(scene: Scene) -> None:
    measured(scene, "expert0")
    document = yaml.safe_load(scene.recipe.read_text())
    scene.suite.experts[0].path.rename(scene.folder / "renamed")
    models = [{"model": str(scene.folder / "renamed")}, document["models"][1]]
    scene.recipe.write_text(yaml.safe_dump({**document, "models": models}))
    result = merge(scene)
    assert "moments has second moments of expert0, none of which is an expert of this recipe" in result.output


def test_matrices_without_moments_keep_their_estimates(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    scene = make("qwen3-moe", update=Update.EVEN, scale=0.1)
    measured(scene, "expert0")
    caplog.set_level(logging.INFO)
    result = merge(scene)
    assert result.exit_code == 0, result.output
    assert "model.layers.0.mlp.gate.weight" in caplog.text
    with_moments = read_tensors(scene.folder / "merged")
    without = ["merge", str(scene.recipe), str(scene.folder / "estimated")]
    assert CliRunner().invoke(main, without).exit_code == 0
    estimated = read_tensors(scene.folder / "estimated")
    stacks = [name for name in estimated if "experts" in name]
    assert stacks
    assert all(torch.equal(with_moments[name], estimated[name]) for name in stacks)
    assert not torch.equal(*(m["model.layers.0.self_attn.q_proj.weight"] for m in (with_moments, estimated)))


def test_settings_that_take_no_moments_say_so(make: Make) -> None:
    scene = make("llama", update=Update.EVEN, scale=0.1)
    measured(scene, "expert0")
    result = merge(scene, preset="published")
    assert "measured second moments cannot be combined with preset: published" in result.output
    document = yaml.safe_load(scene.recipe.read_text())
    scene.recipe.write_text(yaml.safe_dump({**document, "merge_method": "wudi"}))
    result = merge(scene, solver="adam")
    assert "solver: adam descends the objective of estimated second moments" in result.output


def test_inspect_measures_the_merge_by_moments(make: Make) -> None:
    """Its report is of the merge that the recipe asks for."""
    scene = make("llama", update=Update.EVEN, scale=0.1)
    measured(scene, "expert0", "expert1")
    assert merge(scene).exit_code == 0
    merged, base = read_tensors(scene.folder / "merged"), scene.suite.base.tensors
    file = scene.folder / "report.json"
    result = CliRunner().invoke(main, ["inspect", str(scene.folder / "with-moments.yml"), "--json", str(file)])
    assert result.exit_code == 0, result.output
    name = "model.layers.1.mlp.up_proj.weight"
    (layer,) = [layer for layer in json.loads(file.read_text())["tensors"] if layer["name"] == name]
    assert layer["merged"]["norm"] == pytest.approx(float((merged[name] - base[name]).norm()), rel=1e-4)


def test_check_tells_what_the_moments_are_of(make: Make) -> None:
    """The folder that is missing, an expert without moments, moments of another base."""
    scene = make("llama", update=Update.EVEN, scale=0.1)
    measured(scene, "expert0")
    assert merge(scene).exit_code == 0
    check = ["check", str(scene.folder / "with-moments.yml")]

    def told() -> str:
        return " ".join(CliRunner().invoke(main, check).output.split())

    assert f"moments has no moments of {scene.suite.experts[1].path}" in told()
    change(scene, scene.suite.base.path, "model.layers.0.self_attn.q_proj.weight")
    assert "model.layers.0.self_attn.q_proj.weight of the base is not the weight that the moments in" in told()
    (scene.folder / "moments").rename(scene.folder / "elsewhere")
    assert "error: parameter moments must be a folder that mergekit-ace moments wrote" in told()
