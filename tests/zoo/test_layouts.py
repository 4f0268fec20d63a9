"""What a recipe may look like: slices, modules, gradients, filters, weights by layer."""

from dataclasses import replace
from pathlib import Path

import torch

from tests.checkpoints import make_suite, read_tensors
from tests.checkpoints.suite import Checkpoint
from tests.commands import mergekit_yaml
from tests.end_to_end.comparison import PUBLISHED, assert_merged, assert_tensor, recipe_for, reference_for
from tests.reference import AceOptions
from tests.zoo.forward import load_and_run


def layer_of(name: str) -> int | None:
    """The number of a layer's tensor, None for those before and after the layers."""
    return int(name.split(".")[2]) if ".layers." in name else None


def test_layer_ranges(tmp_path: Path) -> None:
    """A taller model: layers 0-1 of one merge, then layers 0-2 of another with other parameters."""
    suite = make_suite("llama", tmp_path)
    everyone = [suite.base, *suite.experts]
    slices = [
        {"sources": [{"model": str(c.path), "layer_range": [0, 2]} for c in everyone[:3]]},
        {
            "sources": [{"model": str(c.path), "layer_range": [0, 3]} for c in everyone],
            "parameters": {"spectral_fraction": 0},
        },
    ]
    recipe = {"merge_method": "ace", "base_model": str(suite.base.path), "slices": slices, "dtype": "float64"}
    out = mergekit_yaml({**recipe, "parameters": PUBLISHED}, tmp_path / "out")
    merged = read_tensors(out)
    reference = reference_for(suite.family)
    plain = replace(reference, options=AceOptions(spectral_fraction=0))
    lower = {name: t for name, t in merged.items() if (layer_of(name) or 0) < 2 and layer_of(name) is not None}
    assert_merged(lower, suite.base, suite.experts[:2], reference, torch.float64)
    upper = {name: tensor for name, tensor in merged.items() if (layer_of(name) or 0) >= 2}
    assert len(upper) == 27
    for name, tensor in upper.items():
        source = name.replace(f".layers.{layer_of(name)}.", f".layers.{layer_of(name) - 2}.")  # type: ignore[operator]
        assert_tensor(name, tensor, [c.tensors[source].double() for c in everyone], plain)
    model = load_and_run(suite.family, out)
    assert model.config.num_hidden_layers == 5


def test_gradients_of_every_numeric_parameter(tmp_path: Path) -> None:
    """Three layers, so a gradient of two ends has a middle."""
    suite = make_suite("llama", tmp_path)
    recipe = recipe_for(
        suite,
        dtype="float64",
        epsilon=[0.01, 1.0],
        spectral_fraction=[0.0, 1.0],
        heterogeneity_threshold=[0.0, 1.0, 5.0],
        **{"lambda": [1.0, 0.5]},
    )
    recipe["models"][0]["parameters"] = {"weight": [0.0, 2.0]}
    merged = read_tensors(mergekit_yaml(recipe, tmp_path / "out"))
    assert merged.keys() == read_tensors(suite.base.path).keys()
    for name, tensor in merged.items():
        depth = (layer_of(name) or 0) / 2
        options = AceOptions(
            epsilon=0.01 + 0.99 * depth,
            spectral_fraction=depth,
            heterogeneity_threshold=(0.0, 1.0, 5.0)[layer_of(name) or 0],
        )
        reference = replace(
            reference_for(suite.family), options=options, weights=(2 * depth, 1.0, 1.0), scale=1 - 0.5 * depth
        )
        inputs = [checkpoint.tensors[name].double() for checkpoint in (suite.base, *suite.experts)]
        assert_tensor(name, tensor, inputs, reference)


def test_filters_of_every_parameter(tmp_path: Path) -> None:
    suite = make_suite("llama", tmp_path)

    def split(attention: object, otherwise: object) -> list[dict[str, object]]:
        return [{"filter": "self_attn", "value": attention}, {"value": otherwise}]

    recipe = recipe_for(
        suite,
        dtype="float64",
        epsilon=split(1.0, 0.01),
        spectral_fraction=split(1.0, 0.1),
        heterogeneity_threshold=split(0, float("inf")),
        structural_prior=split(False, True),
        embeddings=[{"filter": "lm_head", "value": "ace"}, {"filter": "embed_tokens", "value": "base"}],
        **{"lambda": split(0.5, 1.0)},
    )
    recipe["models"][1]["parameters"] = {"weight": split(3.0, 1.0)}
    merged = read_tensors(mergekit_yaml(recipe, tmp_path / "out"))
    assert merged.keys() == read_tensors(suite.base.path).keys()
    reference = reference_for(suite.family)
    attention = replace(
        reference,
        options=AceOptions(epsilon=1.0, spectral_fraction=1.0, heterogeneity_threshold=0, structural_prior=False),
        weights=(1.0, 3.0, 1.0),
        scale=0.5,
    )
    otherwise = replace(reference, options=AceOptions(spectral_fraction=0.1, heterogeneity_threshold=float("inf")))
    for name, tensor in merged.items():
        table = {"lm_head.weight": "ace", "model.embed_tokens.weight": "base"}.get(name, "average")
        expected = replace(attention if "self_attn" in name else otherwise, embeddings=table)
        inputs = [checkpoint.tensors[name].double() for checkpoint in (suite.base, *suite.experts)]
        assert_tensor(name, tensor, inputs, expected)


def test_matrices_by_filter(tmp_path: Path) -> None:
    """ACE for the MLPs, the mean for attention's outputs, the base for the rest of attention."""
    suite = make_suite("mixtral", tmp_path)
    choice = [
        {"filter": "mlp", "value": "ace"},
        {"filter": "o_proj", "value": "average"},
        {"filter": "self_attn", "value": "base"},
    ]
    merged = read_tensors(mergekit_yaml(recipe_for(suite, dtype="float64", matrices=choice), tmp_path / "out"))
    for name, tensor in merged.items():
        inputs = [checkpoint.tensors[name].double() for checkpoint in (suite.base, *suite.experts)]
        if "self_attn" in name and "o_proj" not in name:
            assert torch.equal(tensor, inputs[0]), name
        else:
            reference = replace(reference_for(suite.family), averaged=("*.o_proj.weight",))
            assert_tensor(name, tensor, inputs, reference)


def test_modules(tmp_path: Path) -> None:
    """A vision-language model: the text decoder is merged by ACE, the tower and the projector stay the base's."""
    suite = make_suite("qwen3-vision", tmp_path, scale=0.1)
    models = [{"model": str(expert.path)} for expert in suite.experts]
    kept = {"models": models, "parameters": {"lambda": 0.0}}
    recipe = recipe_for(suite, dtype="float64")
    del recipe["models"]
    recipe["modules"] = {
        "text_decoder": {"models": models},
        "vision_tower": kept,
        "multi_modal_projector": {"models": models, "parameters": {"matrices": "base", "embeddings": "base"}},
    }
    out = mergekit_yaml(recipe, tmp_path / "out")
    merged = read_tensors(out)
    assert merged.keys() == read_tensors(suite.base.path).keys()
    text = {name: tensor for name, tensor in merged.items() if ".visual." not in name}
    assert_merged(text, suite.base, suite.experts, reference_for(suite.family), torch.float64)
    for name in merged.keys() - text.keys():
        if "blocks" in name or (merged[name].ndim == 2 and "merger" in name):
            assert torch.equal(merged[name], suite.base.tensors[name].double()), name
    load_and_run(suite.family, out)


def test_slices_of_other_experts(tmp_path: Path) -> None:
    """Each slice has its own experts, so that one layer is merged from two, another from one."""
    suite = make_suite("llama", tmp_path)

    def sources(first: int, last: int, experts: list[Checkpoint]) -> dict[str, object]:
        return {"sources": [{"model": str(c.path), "layer_range": [first, last]} for c in (suite.base, *experts)]}

    slices = [sources(0, 1, list(suite.experts[:2])), sources(1, 3, [suite.experts[2]])]
    recipe = recipe_for(suite, dtype="float64")
    del recipe["models"]
    merged = read_tensors(mergekit_yaml({**recipe, "slices": slices}, tmp_path / "out"))
    assert_merged(
        {name: tensor for name, tensor in merged.items() if layer_of(name) == 0},
        suite.base,
        suite.experts[:2],
        reference_for(suite.family),
        torch.float64,
    )
    for name, tensor in merged.items():
        if layer_of(name) in (1, 2):  # the only expert there: its own weights, exactly
            assert torch.equal(tensor, suite.experts[2].tensors[name].double()), name


def test_weights_by_layer_and_expert(tmp_path: Path) -> None:
    """An expert that is heard in the MLPs only, and one whose weight falls with depth."""
    suite = make_suite("llama", tmp_path)
    recipe = recipe_for(suite, dtype="float64")
    recipe["models"][0]["parameters"] = {"weight": [{"filter": "mlp", "value": 1.0}, {"value": 0.0}]}
    recipe["models"][1]["parameters"] = {"weight": [3.0, 1.0]}
    merged = read_tensors(mergekit_yaml(recipe, tmp_path / "out"))
    for name, tensor in merged.items():
        weights = (1.0 if "mlp" in name else 0.0, 3 - (layer_of(name) or 0), 1.0)
        inputs = [checkpoint.tensors[name].double() for checkpoint in (suite.base, *suite.experts)]
        assert_tensor(name, tensor, inputs, replace(reference_for(suite.family), weights=weights))
