"""`inspect --adapter` measures on cores what an inspection of the full merge measures on matrices."""

import json
from pathlib import Path

import pytest
import yaml
from mergekit.options import MergeOptions

from mergekit_ace.adapters.from_recipe import request_of
from mergekit_ace.recipe.reading import read_recipe
from mergekit_ace.report.inspection import inspect_recipe
from mergekit_ace.report.model import TensorReport
from mergekit_ace.report.of_adapters import assemble_adapters, inspect_adapters
from tests.checkpoints import Suite, add_adapter, make_suite
from tests.cli.conftest import Invoke, invoke  # noqa: F401 - a fixture

# Updates of norm one, taken from differences of float32 weights; losses and refinement by float32 Gram products.
_TOLERANCE = 2e-4
TARGETS = (["q_proj", "up_proj"], ["q_proj", "v_proj"], ["q_proj", "down_proj", "up_proj"])


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    return make_suite("llama", tmp_path_factory.mktemp("suite"), experts=1)


@pytest.fixture
def recipe(suite: Suite, tmp_path: Path) -> Path:
    base = str(suite.base.path)
    models = [
        {"model": f"{base}+{add_adapter(suite.base.path, tmp_path / f'a{t}', rank=2, targets=targets, seed=t)}"}
        for t, targets in enumerate(TARGETS)
    ]
    file = tmp_path / "recipe.yml"
    document = {"merge_method": "ace", "base_model": base, "models": models, "dtype": "float32"}
    file.write_text(yaml.safe_dump(document | {"parameters": {"preset": "published"}}))
    return file


def numbers(tensor: TensorReport) -> dict[str, float | None]:
    found: dict[str, float | None] = {
        name: getattr(tensor, name) for name in ("heterogeneity", "heterogeneity_published")
    }
    for expert in tensor.experts:
        for name in ("norm", "energy_share", "ridge", "effective_rank", "loss"):
            found[f"{name} of {expert.expert[-2:]}"] = getattr(expert, name)
    if tensor.merged is not None:
        for name in ("norm", "relative_norm", "relative_to_mean", "effective_rank"):
            found[f"merged {name}"] = getattr(tensor.merged, name)
    if tensor.interference is not None:
        found["alignment"] = tensor.interference.alignment[0][1]
        found["overlap"] = tensor.interference.overlap[0][1]
    return found


def test_the_numbers_are_those_of_the_full_merge(recipe: Path, tmp_path: Path) -> None:
    options = MergeOptions(lora_merge_cache=str(tmp_path / "cache"), lora_merge_dtype="float32")
    full = {tensor.name: tensor for tensor in inspect_recipe(recipe, options).tensors}
    request = request_of(read_recipe(recipe).config, MergeOptions())
    measured = inspect_adapters(request, list(request.places.values()), "full")
    report = assemble_adapters(request, "recipe", measured, "full")
    assert len(report.tensors) == 3 * 4
    for layer in report.tensors:
        expected = full[layer.name]
        assert (layer.treatment, layer.shape, layer.depth, layer.kind) == (
            expected.treatment,
            expected.shape,
            expected.depth,
            expected.kind,
        )
        ours, theirs = numbers(layer), numbers(expected)
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            close = None if value is None else pytest.approx(value, rel=_TOLERANCE, abs=_TOLERANCE)
            assert ours[name] == close, (layer.name, name)
    assert {layer.treatment for layer in report.tensors} == {"single expert", "merged"}


def test_the_command_needs_no_base(recipe: Path, tmp_path: Path, invoke: Invoke) -> None:  # noqa: F811
    base = yaml.safe_load(recipe.read_text())["base_model"]
    recipe.write_text(recipe.read_text().replace(base, "somebody/else-has-it"))
    result = invoke(
        "inspect", recipe, "--adapter", "--json", tmp_path / "report.json", "--html", tmp_path / "page.html"
    )
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["base"] == "somebody/else-has-it"
    assert document["experts"] == ["a0", "a1", "a2"]
    assert len(document["tensors"]) == 12
    assert (tmp_path / "page.html").stat().st_size > 10_000
    recipe.write_text(recipe.read_text().replace("merge_method: ace", "merge_method: ties"))
    refused = invoke("inspect", recipe, "--adapter")
    assert refused.exit_code == 1
    assert "must be one that gives an adapter" in refused.stderr
