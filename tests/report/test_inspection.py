"""Whole recipes: families, adapters, slices, filters, other methods, and checkpoints that are not whole."""

import shutil
from pathlib import Path

import pytest
import torch
from mergekit.options import MergeOptions

from mergekit_ace.recipe.failures import RecipeError
from mergekit_ace.recipe.planning import planned
from mergekit_ace.recipe.reading import read_recipe
from mergekit_ace.report.advice import advise
from mergekit_ace.report.inspection import inspect_recipe, inspect_tensors
from mergekit_ace.report.summary import summarize
from mergekit_ace.report.wording import label
from tests.checkpoints import Suite, Update, add_adapter, edit_tensors, make_suite, read_tensors
from tests.commands import mergekit_yaml
from tests.report.recipes import document, write

ROUNDING = 1e-4  # relative; a float32 merge read back


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    return make_suite("llama", tmp_path_factory.mktemp("llama"), dtype=torch.bfloat16, update=Update.UNEVEN)


def damaged(suite: Suite, folder: Path) -> Path:
    """A copy of the suite's first expert that may be spoiled."""
    return Path(shutil.copytree(suite.experts[0].path, folder / "damaged"))


def test_conv1d_layers_are_turned_as_in_the_merge(tmp_path: Path) -> None:
    suite = make_suite("gpt2", tmp_path, update=Update.UNEVEN)
    turned = [{"filter": name, "value": "first"} for name in ("c_attn", "c_proj", "c_fc")]
    recipe = document(suite, parameters={"preset": "published", "input_axis": [*turned, {"value": "last"}]})
    report = inspect_recipe(write(recipe, tmp_path / "recipe.yml"))
    merged = read_tensors(mergekit_yaml(recipe, tmp_path / "merged"))
    layers = {tensor.name: tensor for tensor in report.tensors if tensor.merged is not None}
    assert len(layers) == 3 * 4
    for name, tensor in layers.items():
        assert tensor.merged is not None
        assert tensor.shape == tuple(merged[name].shape)
        change = (merged[name].double() - suite.base.tensors[name].double()).norm()
        assert tensor.merged.norm == pytest.approx(float(change), rel=ROUNDING)


def test_stacked_experts_are_reported_slice_by_slice(tmp_path: Path) -> None:
    suite = make_suite("mixtral", tmp_path, update=Update.EVEN)
    recipe = document(suite)
    report = inspect_recipe(write(recipe, tmp_path / "recipe.yml"))
    merged = read_tensors(mergekit_yaml(recipe, tmp_path / "merged"))
    assert {label(tensor) for tensor in report.tensors if "expert" in tensor.name} == {"homogeneous"}
    for tensor in report.tensors:
        if tensor.merged is None:
            continue
        name, _, rest = tensor.name.partition("[")
        index = int(rest.rstrip("]")) if rest else ...
        change = (merged[name].double() - suite.base.tensors[name].double())[index].norm()
        assert tensor.merged.norm == pytest.approx(float(change), rel=ROUNDING)


def test_adapters_are_read_as_the_merge_reads_them(tmp_path: Path) -> None:
    suite = make_suite("llama", tmp_path, experts=1, update=Update.FROZEN)
    adapters = [
        add_adapter(suite.base.path, tmp_path / f"adapter{t}", rank=2, targets=["q_proj", "down_proj"], seed=t)
        for t in range(2)
    ]
    recipe = document(suite, models=[{"model": f"{suite.base.path}+{adapter}"} for adapter in adapters])
    options = MergeOptions(lora_merge_cache=str(tmp_path / "cache"))
    report = inspect_recipe(write(recipe, tmp_path / "recipe.yml"), options)
    solved = [tensor for tensor in report.tensors if tensor.merged is not None]
    assert {tensor.kind for tensor in solved} == {"self_attn.q_proj", "mlp.down_proj"}
    for tensor in solved:
        assert all(expert.effective_rank is not None and expert.effective_rank < 2.01 for expert in tensor.experts)
    assert summarize(report).treatments["unchanged"] == len(report.tensors) - len(solved)


def test_slices_and_gradients_are_mergekits_own(llama: Suite, tmp_path: Path) -> None:
    sources = [{"model": str(checkpoint.path), "layer_range": [1, 3]} for checkpoint in (llama.base, *llama.experts)]
    recipe = document(llama, slices=[{"sources": sources}], parameters={"epsilon": [0.1, 10.0]})
    del recipe["models"]
    report = inspect_recipe(write(recipe, tmp_path / "recipe.yml"), mode="fast")
    assert {tensor.depth for tensor in report.tensors} == {None, 0, 1}
    first, last = (
        next(tensor for tensor in report.tensors if tensor.depth == depth and tensor.kind == "mlp.up_proj")
        for depth in (0, 1)
    )
    base = llama.base.tensors["model.layers.1.mlp.up_proj.weight"].double()
    moved = llama.experts[0].tensors["model.layers.1.mlp.up_proj.weight"].double() - base
    assert first.experts[0].norm == pytest.approx(float(moved.norm()), rel=1e-6)
    assert (first.parameters["epsilon"], last.parameters["epsilon"]) == (0.1, 10.0)


def test_a_vocabulary_is_aligned_before_norms_are_taken(llama: Suite, tmp_path: Path) -> None:
    recipe = document(llama, parameters={"embeddings": "base"})
    report = inspect_recipe(write(recipe, tmp_path / "recipe.yml"), mode="fast")
    tables = [tensor for tensor in report.tensors if tensor.depth is None and len(tensor.shape) == 2]
    assert [tensor.treatment for tensor in tables] == ["base", "base"]
    assert all(len(tensor.experts) == 3 for tensor in tables)


@pytest.mark.parametrize("method", ["actmat", "tsv_m"])
def test_our_other_methods_have_no_gate(llama: Suite, method: str, tmp_path: Path) -> None:
    report = inspect_recipe(write(document(llama, merge_method=method, parameters={}), tmp_path / "recipe.yml"))
    assert report.note is None
    merged = [tensor for tensor in report.tensors if tensor.treatment == "merged"]
    assert len(merged) == 3 * 7
    assert all(
        tensor.gate is None and tensor.merged is not None and tensor.interference is not None for tensor in merged
    )


def test_mergekits_own_methods_get_norms_and_a_note(llama: Suite, tmp_path: Path) -> None:
    recipe = document(llama, merge_method="ties", parameters={"density": 0.5, "weight": 1.0})
    report = inspect_recipe(write(recipe, tmp_path / "recipe.yml"))
    assert report.note is not None
    assert "ties is not a method of mergekit-ace" in report.note
    assert {tensor.treatment for tensor in report.tensors} == {"merged"}
    assert all(len(tensor.experts) == 3 and tensor.merged is None for tensor in report.tensors)


def test_nan_stops_one_tensor_and_not_the_report(llama: Suite, tmp_path: Path) -> None:
    expert = damaged(llama, tmp_path)
    name = "model.layers.1.self_attn.k_proj.weight"
    with edit_tensors(expert / "model.safetensors") as tensors:
        tensors[name][3, 5] = torch.nan
    models = [{"model": str(expert)}, {"model": str(llama.experts[1].path)}]
    report = inspect_recipe(write(document(llama, models=models), tmp_path / "recipe.yml"), mode="fast")
    failed = summarize(report).failed
    assert [tensor.name for tensor in failed] == [name]
    assert failed[0].error is not None
    assert str(expert) in failed[0].error
    assert "NaN" in failed[0].error
    assert len(report.tensors) == len(llama.base.tensors)
    assert [finding.level for finding in advise(report)][:1] == ["error"]


def test_a_missing_tensor_is_named(llama: Suite, tmp_path: Path) -> None:
    expert = damaged(llama, tmp_path)
    name = "model.layers.0.mlp.gate_proj.weight"
    with edit_tensors(expert / "model.safetensors") as tensors:
        del tensors[name]
    report = inspect_recipe(
        write(document(llama, models=[{"model": str(expert)}]), tmp_path / "recipe.yml"), mode="fast"
    )
    assert [tensor.name for tensor in summarize(report).failed] == [name]


def test_a_truncated_file_is_an_error_before_anything_is_measured(llama: Suite, tmp_path: Path) -> None:
    expert = damaged(llama, tmp_path)
    file = expert / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    recipe = write(document(llama, models=[{"model": str(expert)}]), tmp_path / "recipe.yml")
    with pytest.raises(RecipeError, match="cannot plan this merge"):
        inspect_recipe(recipe)


def test_what_is_not_a_recipe_is_an_error(tmp_path: Path) -> None:
    for text in ("merge_method: [", "- a list", "merge_method: ace", "{}"):
        (tmp_path / "recipe.yml").write_text(text)
        with pytest.raises(RecipeError, match=r"recipe\.yml"):
            inspect_recipe(tmp_path / "recipe.yml")


def test_layers_come_one_by_one_in_the_order_of_the_model(llama: Suite, tmp_path: Path) -> None:
    recipe = read_recipe(write(document(llama), tmp_path / "recipe.yml"))
    with planned(recipe, MergeOptions()) as plan:
        depths = [tensor.depth for tensor in inspect_tensors(plan, plan.tensors, "fast")]
    inner = [depth for depth in depths if depth is not None]
    assert inner == sorted(inner)
    assert depths[0] is None
    assert depths[-1] is None


def test_planning_leaves_no_file_open_and_the_recipe_as_it_was(llama: Suite, tmp_path: Path) -> None:
    from mergekit.io.tasks import LoaderCache

    recipe = read_recipe(write(document(llama), tmp_path / "recipe.yml"))
    before = recipe.config.model_copy(deep=True)
    shared = dict(LoaderCache.loaders)
    with planned(recipe, MergeOptions()):
        pass
    assert recipe.config == before
    assert LoaderCache.loaders == shared
