"""What a user gets instead of a broken model: an error that names the culprit, and no output."""

import re
from pathlib import Path

import pytest
import torch
from mergekit.merge_methods.api import merge_tensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.checkpoints import FAMILIES, Suite, make_suite
from tests.checkpoints.suite import Checkpoint
from tests.commands import mergekit_pytorch, mergekit_yaml
from tests.end_to_end.comparison import PUBLISHED, recipe_for


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    return make_suite("llama", tmp_path_factory.mktemp("suite"), experts=2)


def fails(recipe: dict[str, object], out: Path, message: str, error: type[Exception] = Exception) -> None:
    """The recipe fails with a message that matches, and leaves no file that could be taken for a model."""
    with pytest.raises(error, match=message):
        mergekit_yaml(recipe, out)
    assert not list(out.glob("*.safetensors")) + list(out.glob("*.bin")) + list(out.glob("*.json"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("preset", "paper"),
        ("epsilon", 0),
        ("epsilon", -1.0),
        ("epsilon", "small"),
        ("epsilon", float("nan")),
        ("epsilon", float("inf")),
        ("epsilon", True),
        ("heterogeneity", "gini"),
        ("heterogeneity_threshold", -0.1),
        ("heterogeneity_threshold", "high"),
        ("heterogeneity_threshold", float("nan")),
        ("spectral_fraction", -0.01),
        ("spectral_fraction", 1.01),
        ("spectral_fraction", float("nan")),
        ("spectral_fraction", "all"),
        ("structural_prior", "maybe"),
        ("structural_prior", 2),
        ("retention_bound", "strong"),
        ("length_bound", "long"),
        ("length_bound", 2.0),
        ("correlation_threshold", -0.1),
        ("correlation_threshold", 1.5),
        ("correlation_threshold", float("nan")),
        ("matrices", "ties"),
        ("weight", -1.0),
        ("weight", float("inf")),
        ("weight", "heavy"),
        ("lambda", "much"),
        ("lambda", float("nan")),
        ("embeddings", "mean"),
        ("input_axis", "middle"),
    ],
)
def test_parameters_out_of_range(name: str, value: object, suite: Suite, tmp_path: Path) -> None:
    fails(recipe_for(suite, **{name: value}), tmp_path / "out", rf"\b{name}\b.* must ", ValueError)


def test_a_bad_value_behind_a_filter(suite: Suite, tmp_path: Path) -> None:
    setting = [{"filter": "down_proj", "value": 7}, {"value": 0.3}]
    fails(
        recipe_for(suite, spectral_fraction=setting), tmp_path / "out", r"\bspectral_fraction\b.* must .*7", ValueError
    )


def test_no_base(suite: Suite, tmp_path: Path) -> None:
    recipe = recipe_for(suite)
    del recipe["base_model"]
    fails(recipe, tmp_path / "out", "base")


def test_the_base_is_the_only_model(suite: Suite, tmp_path: Path) -> None:
    recipe = {**recipe_for(suite), "models": [{"model": str(suite.base.path)}]}
    fails(recipe, tmp_path / "out", "at least 1 non-base")


def test_a_weight_of_zero_for_all(suite: Suite, tmp_path: Path) -> None:
    fails(recipe_for(suite, weights=[0.0, 0.0]), tmp_path / "out", "weight must be positive", ValueError)


def test_an_expert_that_is_not_there(suite: Suite, tmp_path: Path) -> None:
    recipe = recipe_for(suite)
    recipe["models"] = [*recipe["models"], {"model": str(tmp_path / "nowhere")}]
    fails(recipe, tmp_path / "out", "nowhere")


def test_no_experts(suite: Suite, tmp_path: Path) -> None:
    fails({**recipe_for(suite), "models": []}, tmp_path / "out", "model")


def test_a_shard_that_is_cut_short(suite: Suite, tmp_path: Path) -> None:
    folder = damaged(suite.experts[0], tmp_path / "cut", TENSORS[0], 1.0)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    recipe = recipe_for(suite)
    recipe["models"] = [{"model": str(folder)}, *recipe["models"]]
    fails(recipe, tmp_path / "out", "(?i)incomplete|invalid|header|file")


def test_the_base_among_the_models_is_no_expert(suite: Suite, tmp_path: Path) -> None:
    recipe = recipe_for(suite)
    mergekit_yaml(recipe, tmp_path / "without")
    mergekit_yaml({**recipe, "models": [{"model": str(suite.base.path)}, *recipe["models"]]}, tmp_path / "with")
    files = sorted(path.name for path in (tmp_path / "without").glob("*.safetensors"))
    assert files
    for name in files:
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()


def test_an_expert_listed_twice(suite: Suite, tmp_path: Path) -> None:
    recipe = recipe_for(suite)
    recipe["models"] = [*recipe["models"], recipe["models"][0]]
    fails(recipe, tmp_path / "out", "Duplicate", ValueError)


def test_shapes_that_differ(suite: Suite, tmp_path: Path) -> None:
    config = FAMILIES["llama"].build().config
    config.intermediate_size = 64
    type(FAMILIES["llama"].build())(config).save_pretrained(tmp_path / "wider")
    recipe = recipe_for(suite)
    recipe["models"] = [*recipe["models"], {"model": str(tmp_path / "wider")}]
    fails(recipe, tmp_path / "out", r"mlp\.\w+_proj", ValueError)


def damaged(checkpoint: Checkpoint, folder: Path, name: str, value: float) -> Path:
    """A copy of a checkpoint with one bad entry."""
    folder.mkdir()
    for file in checkpoint.path.iterdir():
        if file.suffix == ".safetensors":
            tensors = load_file(file)
            tensors[name].view(-1)[-1] = value
            save_file(tensors, folder / file.name, metadata={"format": "pt"})
        else:
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


TENSORS = ("model.layers.1.mlp.up_proj.weight", "model.layers.2.input_layernorm.weight", "model.embed_tokens.weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("name", TENSORS)
def test_damage_in_an_expert(name: str, value: float, suite: Suite, tmp_path: Path) -> None:
    folder = damaged(suite.experts[1], tmp_path / "damaged", name, value)
    recipe = recipe_for(suite)
    recipe["models"][1]["model"] = str(folder)
    with pytest.raises(ValueError, match=re.escape(str(folder))) as caught:
        mergekit_yaml(recipe, tmp_path / "out")
    assert name in str(caught.value)
    assert str(suite.experts[0].path) not in str(caught.value)
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("embeddings", ["average", "base", "ace"])
@pytest.mark.parametrize("name", TENSORS)
def test_damage_in_the_base(name: str, embeddings: str, suite: Suite, tmp_path: Path) -> None:
    folder = damaged(suite.base, tmp_path / "damaged", name, float("nan"))
    recipe = {**recipe_for(suite, embeddings=embeddings), "base_model": str(folder)}
    fails(recipe, tmp_path / "out", re.escape(name) + ".*base", ValueError)


def test_damage_in_one_slice_of_a_stack() -> None:
    base, expert = torch.zeros(4, 3, 5), torch.ones(4, 3, 5)
    expert[2, 1, 1] = torch.nan
    with pytest.raises(ValueError, match=r"experts\.down_proj\[2\].*maths"):
        merge_tensors(
            [base, torch.ones(4, 3, 5), expert],
            "ace",
            base_index=0,
            ids=["base", "code", "maths"],
            name="layers.0.experts.down_proj",
            parameters=PUBLISHED,
        )


def test_16_bit_inputs_whose_difference_overflows() -> None:
    """Finite inputs, yet the merged weight has no number in float16: never an infinity without an error."""
    base, expert = torch.full((2, 4, 4), 6e4, dtype=torch.float16)
    with pytest.raises(ValueError, match="up_proj"):
        merge_tensors([base, -expert], "ace", base_index=0, name="up_proj", parameters={**PUBLISHED, "lambda": -1.0})


@pytest.mark.parametrize("name", ["up_proj.weight", "norm.weight"])
def test_a_merge_that_its_out_dtype_cannot_hold(name: str) -> None:
    base = torch.zeros(4, 4)[: None if "up" in name else 1]
    expert = base + 7e4
    with pytest.raises(ValueError, match=f"{name}: every stored weight must be finite; .* 65504 at which float16 ends"):
        merge_tensors([base, expert], "ace", base_index=0, name=name, out_dtype=torch.float16)
    kept = merge_tensors([base, expert], "ace", base_index=0, name=name, out_dtype=torch.bfloat16)
    assert torch.equal(kept, expert.bfloat16())
    # A constant that means minus infinity may become one.
    mask = torch.tensor(-1e9)
    constant = merge_tensors([mask, mask], "ace", base_index=0, name="attn.masked_bias", out_dtype=torch.float16)
    assert constant == -torch.inf


def test_weights_that_a_dtype_cannot_hold(suite: Suite, tmp_path: Path) -> None:
    """The checkpoint is whole: the recipe's own dtype makes the infinity."""
    folder = damaged(suite.experts[1], tmp_path / "large", TENSORS[0], 7e4)
    recipe = {**recipe_for(suite), "models": [{"model": str(folder)}], "dtype": "float16"}
    fails(recipe, tmp_path / "out", "it may exceed the range of dtype: float16; set dtype: float32", ValueError)


@pytest.mark.parametrize("out_dtype", [None, "float16"])
def test_a_mask_of_infinities_is_no_damage(out_dtype: str | None, tmp_path: Path) -> None:
    """As in checkpoints of CLIP's kind, which store it beside the weights."""
    mask, generator = torch.full((4, 4), -torch.inf).triu(1), torch.Generator().manual_seed(0)
    files = [tmp_path / f"{index}.safetensors" for index in range(3)]
    for file in files:
        save_file({"text.attn_mask": mask, "text.proj.weight": torch.randn(4, 4, generator=generator)}, file)
    recipe = {"merge_method": "ace", "base_model": str(files[0]), "out_dtype": out_dtype}
    mergekit_pytorch(recipe | {"models": [{"model": str(file)} for file in files[1:]]}, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(merged["text.attn_mask"].float(), mask)
    assert merged["text.proj.weight"].isfinite().all()


def test_mergekit_pytorch_says_the_same(suite: Suite, tmp_path: Path) -> None:
    name = TENSORS[0]
    folder = damaged(suite.experts[0], tmp_path / "damaged", name, float("nan"))
    files = [path / "model.safetensors" for path in (suite.base.path, folder, suite.experts[1].path)]
    recipe = {
        "merge_method": "ace",
        "base_model": str(files[0]),
        "models": [{"model": str(file)} for file in files],
        "parameters": PUBLISHED,
    }
    with pytest.raises(ValueError, match=re.escape(name)):
        mergekit_pytorch(recipe, tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([torch.zeros(3, 4)], "at least 1 non-base"),
        ([torch.zeros(3, 4), torch.zeros(3, 5)], "mismatch"),
    ],
    ids=["no expert", "shapes"],
)
def test_merge_tensors(tensors: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge_tensors(tensors, "ace", base_index=0, parameters=PUBLISHED)
    with pytest.raises(ValueError, match="base"):
        merge_tensors(tensors, "ace", parameters=PUBLISHED)
