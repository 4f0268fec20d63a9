"""What an expert may be: an adapter, a full fine-tune, of another dtype; and mergekit's own options."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoints import Suite, add_adapter, make_suite, read_tensors
from tests.checkpoints.suite import Checkpoint
from tests.commands import mergekit_yaml
from tests.end_to_end.comparison import PUBLISHED, assert_merged, assert_suite_merged, recipe_for, reference_for

# Rank and target modules: some layers have four adapters, some one, some none.
ADAPTERS = {
    4: ["q_proj", "v_proj"],
    8: ["q_proj", "k_proj", "up_proj"],
    16: ["q_proj", "up_proj", "down_proj"],
    64: ["q_proj", "o_proj", "gate_proj"],
}


def adapters(base: Path, folder: Path) -> list[Path]:
    return [
        add_adapter(base, folder / f"adapter-{rank}", rank=rank, targets=targets, seed=rank)
        for rank, targets in ADAPTERS.items()
    ]


def merged_adapters(cache: Path, paths: list[Path]) -> list[Checkpoint]:
    """The full models that mergekit made of base + adapter, in the adapters' order."""
    folders = {path.name.split("_")[-2]: path for path in cache.iterdir()}
    return [Checkpoint(folders[path.name], read_tensors(folders[path.name])) for path in paths]


def with_exact_updates(merged: Checkpoint, base: Checkpoint, adapter: Path) -> Checkpoint:
    """The base and the update of an adapter's own factors, which mergekit rounds to float32 when it merges them."""
    settings = json.loads((adapter / "adapter_config.json").read_text())
    factors = load_file(adapter / "adapter_model.safetensors")
    tensors = dict(merged.tensors)
    for key in (key for key in factors if key.endswith("lora_A.weight")):
        name = key.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
        update = factors[key.replace("lora_A", "lora_B")].double() @ factors[key].double()
        tensors[name] = base.tensors[name].double() + settings["lora_alpha"] / settings["r"] * update
    return Checkpoint(merged.path, tensors)


@pytest.mark.parametrize("full", [0, 2], ids=["adapters", "adapters and full fine-tunes"])
def test_adapters(full: int, tmp_path: Path) -> None:
    suite = make_suite("llama", tmp_path, experts=max(full, 1), scale=0.1)
    paths = adapters(suite.base.path, tmp_path)
    fine_tunes = suite.experts[:full]
    names = [f"{suite.base.path}+{path}" for path in paths] + [str(expert.path) for expert in fine_tunes]
    recipe = {
        "merge_method": "ace",
        "base_model": str(suite.base.path),
        "models": [{"model": name} for name in names],
        "parameters": PUBLISHED,
        "dtype": "float64",
    }
    cache = tmp_path / "cache"
    out = mergekit_yaml(recipe, tmp_path / "out", "--lora-merge-cache", str(cache), "--lora-merge-dtype", "float32")
    experts = [*merged_adapters(cache, paths), *fine_tunes]
    if not full:  # the method takes the factors from the adapters' files
        experts = [with_exact_updates(e, suite.base, path) for e, path in zip(experts, paths, strict=True)]
    merged = read_tensors(out)
    assert merged.keys() == read_tensors(suite.base.path).keys()
    assert_merged(merged, suite.base, experts, reference_for(suite.family), torch.float64)


@pytest.mark.parametrize(
    "flags",
    [
        ("--low-cpu-memory",),
        ("--read-to-gpu",),
        ("--async-write", "--write-threads", "2"),
        ("--multi-gpu", "--device", "cpu") if torch.cuda.is_available() else ("--device", "cpu"),
        ("--clone-tensors", "--no-safe-serialization"),
        ("--random-seed", "3", "--no-write-model-card", "--quiet"),
    ],
    ids=lambda flags: flags[0],
)
def test_options_of_mergekit(flags: tuple[str, ...], tmp_path: Path) -> None:
    suite = make_suite("llama", tmp_path)
    out = mergekit_yaml(recipe_for(suite), tmp_path / "out", *flags)
    assert_suite_merged(read_tensors(out), suite, reference_for(suite.family))


DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


@pytest.mark.parametrize("out_dtype", ["float16", "float32"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_and_out_dtype(dtype: str, out_dtype: str, tmp_path: Path) -> None:
    """`dtype` rounds the inputs, `out_dtype` the output; the experts are of two dtypes."""
    suite = make_suite(
        "llama", tmp_path, expert_dtypes=[torch.bfloat16, torch.bfloat16, torch.float32], dtype=torch.bfloat16
    )
    merged = read_tensors(mergekit_yaml({**recipe_for(suite, dtype=dtype), "out_dtype": out_dtype}, tmp_path / "out"))
    assert {tensor.dtype for tensor in merged.values()} == {DTYPES[out_dtype]}
    if dtype in ("float32", "float64") and out_dtype == "float16":
        assert_suite_merged(merged, suite, reference_for(suite.family), DTYPES[dtype])
    if dtype == out_dtype == "float32":
        assert_suite_merged(merged, suite, reference_for(suite.family), torch.float32)


def test_the_same_expert_twice_is_mergekits_error(tmp_path: Path) -> None:
    suite: Suite = make_suite("llama", tmp_path, experts=2)
    recipe = recipe_for(suite)
    recipe["models"] = [recipe["models"][0]] * 2
    with pytest.raises(ValueError, match="Duplicate"):
        mergekit_yaml(recipe, tmp_path / "out")


def test_the_base_listed_as_an_expert_changes_nothing(tmp_path: Path) -> None:
    """mergekit takes it for the base, not for an expert that changed nothing."""
    suite = make_suite("llama", tmp_path, experts=2)
    recipe = recipe_for(suite, dtype="float64")
    listed = {**recipe, "models": [{"model": str(suite.base.path)}, *recipe["models"]]}
    merged = read_tensors(mergekit_yaml(listed, tmp_path / "out"))
    assert_suite_merged(merged, suite, reference_for(suite.family), torch.float64)
