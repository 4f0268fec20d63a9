"""`mergekit-yaml` on small real models: every tensor of the output is the reference's."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from tests.checkpoints import Storage, make_suite, read_tensors
from tests.commands import mergekit_yaml
from tests.end_to_end.comparison import assert_suite_merged, recipe_for, reference_for
from tests.reference import AceOptions

FAMILIES = ("llama", "llama-tied", "gpt2", "roberta", "mixtral", "qwen3-moe")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_in_the_checkpoints_own_dtype(family: str, dtype: str, tmp_path: Path) -> None:
    suite = make_suite(family, tmp_path, dtype=DTYPES[dtype])
    out = mergekit_yaml(recipe_for(suite), tmp_path / "out")
    merged = read_tensors(out)
    assert {tensor.dtype for tensor in merged.values()} == {DTYPES[dtype]}
    assert_suite_merged(merged, suite, reference_for(suite.family))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_in_float64(family: str, tmp_path: Path) -> None:
    """`dtype: float64` shows the algebra without float32's rounding."""
    suite = make_suite(family, tmp_path)
    merged = read_tensors(mergekit_yaml(recipe_for(suite, dtype="float64"), tmp_path / "out"))
    assert {tensor.dtype for tensor in merged.values()} == {torch.float64}
    assert_suite_merged(merged, suite, reference_for(suite.family), torch.float64)


@pytest.mark.parametrize(
    ("parameters", "options"),
    [
        ({"heterogeneity_threshold": float("inf"), "structural_prior": False}, "E1"),
        ({"spectral_fraction": 0, "structural_prior": False}, "E2"),
        ({"spectral_fraction": 0}, "E3"),
        ({"heterogeneity_threshold": 0, "spectral_fraction": 1.0}, "all open"),
        ({"epsilon": 1e-4, "spectral_fraction": 0.5}, "small ridge"),
        ({"epsilon": 1e3}, "large ridge"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_option(parameters: dict[str, float], options: str, tmp_path: Path) -> None:
    """The rows of the paper's ablation, and the ends of each range."""
    suite = make_suite("llama", tmp_path)
    out = mergekit_yaml(recipe_for(suite, dtype="float64", **parameters), tmp_path / "out")
    recipe = reference_for(suite.family, options=AceOptions(**parameters))
    assert_suite_merged(read_tensors(out), suite, recipe, torch.float64)


@pytest.mark.parametrize("embeddings", ["average", "base", "ace"])
def test_embeddings(embeddings: str, tmp_path: Path) -> None:
    suite = make_suite("roberta", tmp_path)
    out = mergekit_yaml(recipe_for(suite, dtype="float64", embeddings=embeddings), tmp_path / "out")
    assert_suite_merged(read_tensors(out), suite, reference_for(suite.family, embeddings=embeddings), torch.float64)


@pytest.mark.parametrize("weights", [(2.0, 1.0, 0.5), (1.0, 0.0, 3.0), (0.0, 0.0, 0.25)])
def test_weights_and_lambda(weights: tuple[float, ...], tmp_path: Path) -> None:
    suite = make_suite("llama", tmp_path)
    recipe = recipe_for(suite, dtype="float64", weights=weights, **{"lambda": 0.7})
    merged = read_tensors(mergekit_yaml(recipe, tmp_path / "out"))
    assert_suite_merged(merged, suite, reference_for(suite.family, weights=weights, scale=0.7), torch.float64)


def test_conv1d_by_filter(tmp_path: Path) -> None:
    """GPT-2 stores its projections `[in, out]`; a filter turns them, and only them."""
    suite = make_suite("gpt2", tmp_path)
    axis = [{"filter": part, "value": "first"} for part in ("c_attn", "c_proj", "c_fc")] + [{"value": "last"}]
    merged = read_tensors(mergekit_yaml(recipe_for(suite, dtype="float64", input_axis=axis), tmp_path / "out"))
    recipe = reference_for(suite.family, input_first=suite.family.input_first)
    assert_suite_merged(merged, suite, recipe, torch.float64)


LAZILY = pytest.param(
    ("--lazy-unpickle",),
    marks=pytest.mark.xfail(sys.version_info >= (3, 13), reason="mergekit 0.1.5 cannot (docs/limits.md)", strict=True),
)


@pytest.mark.parametrize("flags", [("--out-shard-size", "10K"), LAZILY], ids=lambda flags: flags[0])
@pytest.mark.parametrize("storage", ["pickle", "sharded pickle"])
def test_pickles(storage: Storage, flags: tuple[str, ...], tmp_path: Path) -> None:
    suite = make_suite("llama", tmp_path, storage=storage)
    out = mergekit_yaml(recipe_for(suite), tmp_path / "out", *flags)
    assert_suite_merged(read_tensors(out), suite, reference_for(suite.family))


def test_shards(tmp_path: Path) -> None:
    suite = make_suite("llama", tmp_path, storage="sharded")
    out = mergekit_yaml(recipe_for(suite), tmp_path / "out", "--out-shard-size", "10K")
    assert_suite_merged(read_tensors(out), suite, reference_for(suite.family))


def test_mixed_dtypes_are_promoted(tmp_path: Path) -> None:
    """A bf16 base with fp16 and fp32 experts: merged in float32, the type that holds them all."""
    suite = make_suite(
        "llama", tmp_path, dtype=torch.bfloat16, expert_dtypes=[torch.float16, torch.bfloat16, torch.float32]
    )
    merged = read_tensors(mergekit_yaml(recipe_for(suite), tmp_path / "out"))
    assert_suite_merged(merged, suite, reference_for(suite.family), torch.float32)


def test_out_dtype_rounds_once_at_the_end(tmp_path: Path) -> None:
    suite = make_suite("llama", tmp_path)
    recipe = {**recipe_for(suite, dtype="float32"), "out_dtype": "bfloat16"}
    merged = read_tensors(mergekit_yaml(recipe, tmp_path / "out"))
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    assert_suite_merged(merged, suite, reference_for(suite.family))


def test_command_in_a_process_of_its_own(tmp_path: Path) -> None:
    """The whole way of a user: command, files, and a model that transformers loads and runs."""
    suite = make_suite("llama", tmp_path)
    recipe, out = tmp_path / "recipe.yml", tmp_path / "out"
    recipe.write_text(yaml.safe_dump(recipe_for(suite)))
    program = "import mergekit_ace; mergekit_ace.register(); from mergekit.scripts.run_yaml import main; main()"
    subprocess.run(
        [sys.executable, "-c", program, str(recipe), str(out), "--no-copy-tokenizer", "-j", "2"],
        check=True,
        capture_output=True,
    )
    assert_suite_merged(read_tensors(out), suite, reference_for(suite.family))
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert bool(model(**suite.family.inputs()).logits.isfinite().all())


def test_model_card_names_the_method_and_links_the_paper(tmp_path: Path) -> None:
    suite = make_suite("llama", tmp_path, experts=2)
    card = (mergekit_yaml(recipe_for(suite), tmp_path / "out") / "README.md").read_text()
    assert "https://arxiv.org/abs/2603.02945" in card
    assert "ACE" in card


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    suite = make_suite("llama", tmp_path, dtype=torch.bfloat16)
    files = [mergekit_yaml(recipe_for(suite), tmp_path / run) / "model.safetensors" for run in ("first", "second")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_order_of_the_experts_does_not_matter(tmp_path: Path) -> None:
    suite = make_suite("llama", tmp_path)
    recipe = recipe_for(suite, dtype="float64")
    backwards = {**recipe, "models": recipe["models"][::-1]}
    first, second = (
        read_tensors(mergekit_yaml(r, tmp_path / name)) for r, name in ((recipe, "first"), (backwards, "second"))
    )
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-9, atol=1e-10)
