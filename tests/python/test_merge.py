"""`merge` and `inspect` from Python: the same weights as the commands, for folders, state dicts and live models."""

from pathlib import Path

import pytest
import torch
from mergekit.merge_methods import merge_tensors
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from mergekit_ace import inspect, merge
from mergekit_ace.recipe.failures import RecipeError
from tests.checkpoints import Suite, make_suite
from tests.commands import mergekit_yaml

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    return make_suite("llama", tmp_path_factory.mktemp("llama"), experts=2)


def folders(suite: Suite) -> tuple[str, list[str]]:
    return str(suite.base.path), [str(expert.path) for expert in suite.experts]


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_folders_in_memory_and_written_are_what_mergekit_yaml_writes(suite: Suite, tmp_path: Path) -> None:
    base, experts = folders(suite)
    models = [
        {"model": expert, "parameters": {"weight": weight}} for expert, weight in zip(experts, (2.0, 1.0), strict=True)
    ]
    recipe = {"merge_method": "ace", "base_model": base, "models": models, "parameters": {"lambda": 0.5}}
    expected = load_file(mergekit_yaml(recipe, tmp_path / "expected") / "model.safetensors")
    arguments = {"base": base, "weights": [2, 1], "parameters": {"lambda": 0.5}}
    assert same(dict(merge(experts, **arguments).weights), expected)
    merged = merge(experts, out=tmp_path / "merged", **arguments)
    assert merged.out == tmp_path / "merged"
    assert (tmp_path / "merged" / "config.json").exists()
    assert same(dict(merged.weights), expected)
    assert [tensor.name for tensor in merged.report.tensors] == [
        tensor.name for tensor in inspect(experts, base=base, mode="fast").tensors
    ]


def test_a_recipe_file(suite: Suite, tmp_path: Path) -> None:
    base, experts = folders(suite)
    file = tmp_path / "recipe.yml"
    file.write_text(
        f"merge_method: wudi\nbase_model: {base}\nmodels: [{{model: {experts[0]}}}, {{model: {experts[1]}}}]\n"
    )
    assert same(dict(merge(file).weights), dict(merge(experts, base=base, method="wudi").weights))
    assert inspect(file, mode="fast").method == "wudi"
    with pytest.raises(ValueError, match="are those of the recipe"):
        merge(file, base=base)


def test_live_models_and_state_dicts(suite: Suite) -> None:
    base, *experts = (AutoModelForCausalLM.from_pretrained(path) for path in [folders(suite)[0], *folders(suite)[1]])
    live = merge({"maths": experts[0], "code": experts[1]}, base=base, weights=[2, 1])
    dicts = merge([expert.state_dict() for expert in experts], base=base.state_dict(), weights=[2, 1])
    assert same(dict(live.weights), dict(dicts.weights))
    assert not any(tensor.requires_grad for tensor in live.weights.values())
    states = [model.state_dict()[Q] for model in (base, *experts)]
    expected = merge_tensors(states, "ace", base_index=0, name=Q, parameters={"weight": [2.0, 1.0]})
    assert torch.equal(live.weights[Q], expected)
    base.load_state_dict(live.weights)
    report = {tensor.name: tensor for tensor in live.report.tensors}
    assert report.keys() == live.weights.keys()
    assert [(expert.expert, expert.weight) for expert in report[Q].experts] == [("maths", 2.0), ("code", 1.0)]
    assert report[Q].treatment == "merged"


def test_the_report_is_of_the_weights_that_came_out() -> None:
    base = {"up.weight": torch.randn(12, 8)}
    experts = [{"up.weight": base["up.weight"] + 0.01 * torch.randn(12, 8)} for _ in range(2)]
    merged = merge(experts, base=base, parameters={"lambda": 0.5})
    (tensor,) = merged.report.tensors
    assert tensor.merged is not None
    norm = torch.linalg.vector_norm(merged.weights["up.weight"] - base["up.weight"])
    assert tensor.merged.norm == pytest.approx(float(norm), rel=1e-4)


def test_other_methods_of_mergekit_report_norms() -> None:
    base = {"up.weight": torch.zeros(2, 2)}
    merged = merge([{"up.weight": torch.eye(2)}], base=base, method="task_arithmetic", weights=[0.5])
    torch.testing.assert_close(merged.weights["up.weight"], torch.eye(2) * 0.5)
    assert merged.report.tensors[0].experts[0].norm == pytest.approx(2**0.5)
    assert merged.report.tensors[0].merged is None


def test_a_model_that_cannot_be_fetched_is_named(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*arguments: object, **keywords: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.list_repo_files", no_network)
    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", no_network)
    base, experts = folders(suite)
    with pytest.raises(
        RecipeError, match=r"somebody/model is no folder on this disk, .* no route to host. Check its path"
    ):
        merge([experts[0], "somebody/model"], base=base)


def test_a_result_shows_what_it_holds(suite: Suite) -> None:
    base, experts = folders(suite)
    assert (
        repr(merge(experts, base=base)) == "<Merged: 30 tensors; .weights by name, .report for what was done to each>"
    )


def test_errors_name_what_is_wrong(suite: Suite, tmp_path: Path) -> None:
    base, experts = folders(suite)
    state = {"up.weight": torch.randn(4, 4)}
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").touch()
    for arguments, error, message in (
        (([state, experts[0]], {"base": base}), TypeError, "must all be folders"),
        (([state], {}), ValueError, "base must be"),
        (([state], {"base": state, "weights": [1, 2]}), ValueError, "one for each of the 1 experts; got 2"),
        (([state], {"base": state, "parameters": {"epsilom": 1}}), TypeError, "epsilom"),
        (([state], {"base": state, "parameters": {"epsilon": -1}}), ValueError, "epsilon must be"),
        (([state], {"base": state, "method": "acee"}), ValueError, "acee"),
        (([state], {"base": state, "out": tmp_path / "out"}), ValueError, "out is for folders"),
        (([3], {"base": state}), TypeError, "got int"),
        (([tmp_path], {"base": base}), RecipeError, str(tmp_path)),
        ((experts, {"base": base, "parameters": {"epsilom": 1}}), ValueError, "Did you mean epsilon"),
        ((experts, {"base": base, "out": full}), FileExistsError, "overwrite=True"),
    ):
        models, keywords = arguments
        with pytest.raises(error, match=message):
            merge(models, **keywords)
    assert not (tmp_path / "out").exists()
