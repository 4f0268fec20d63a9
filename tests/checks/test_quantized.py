"""Quantized checkpoints: every command refuses them by name, format and remedy, and writes nothing."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from mergekit.merge_methods import merge_tensors
from safetensors.torch import save_file

from mergekit_ace.cli import main
from mergekit_ace.quantization import from_configuration, from_names
from tests.checkpoints import Suite, Update, add_adapter, make_suite
from tests.checkpoints import quantized as kinds
from tests.checkpoints.quantized import Codes, quantize
from tests.commands import mergekit_pytorch, mergekit_yaml
from tests.report.recipes import document, write
from tests.zoo import owners

INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}
# kind: codes, entry in config.json, words of the error, words of the remedy
KINDS: Mapping[str, tuple[Codes, Mapping[str, Any] | None, str, str]] = {
    "int8": (kinds.bitsandbytes_int8, INT8, "bitsandbytes int8", ".dequantize()"),
    "int8 without an entry": (kinds.bitsandbytes_int8, None, "bitsandbytes int8", ".dequantize()"),
    "nf4": (
        kinds.bitsandbytes_nf4,
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "bitsandbytes 4-bit nf4",
        ".dequantize()",
    ),
    "nf4 without an entry": (kinds.bitsandbytes_nf4, None, "bitsandbytes 4-bit", ".dequantize()"),
    "gptq": (kinds.packed, {"quant_method": "gptq", "bits": 4}, "GPTQ 4-bit", "that it was quantized from"),
    "awq": (kinds.packed, {"quant_method": "awq", "bits": 4}, "AWQ 4-bit", "that it was quantized from"),
    "gptq without an entry": (kinds.packed, None, "GPTQ or AWQ", "that it was quantized from"),
    "fp8": (kinds.float8, {"quant_method": "fp8"}, "fp8", "FineGrainedFP8Config(dequantize=True)"),
    "fp8 without an entry": (kinds.float8, None, "codes with scales", "FineGrainedFP8Config(dequantize=True)"),
    "fp8 without scales": (kinds.float8_alone, None, "float8_e4m3fn", "that it was quantized from"),
    "scales of modules": (kinds.module_scales, None, "codes with scales", "that it was quantized from"),
    "eetq without an entry": (kinds.integers_with_scales, None, "codes with scales", "that it was quantized from"),
    "vptq without an entry": (kinds.vector_codes, None, "VPTQ", "that it was quantized from"),
    "fp8 converted": (kinds.float8_converted, None, "codes with scales", "FineGrainedFP8Config(dequantize=True)"),
    "compressed": (
        kinds.compressed_tensors,
        {"quant_method": "compressed-tensors"},
        "compressed-tensors",
        "CompressedTensorsConfig(run_compressed=False)",
    ),
    "integers": (kinds.plain_integers, None, "int8 codes", "that it was quantized from"),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    return make_suite("llama", tmp_path_factory.mktemp("llama"), experts=2, update=Update.EVEN, scale=0.05)


def run(*arguments: object) -> str:
    result = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exit_code == 1, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.output


@pytest.mark.parametrize(
    ("command", "kind"),
    [*(("check", kind) for kind in KINDS), ("merge", "int8"), ("inspect", "int8"), ("merge", "fp8")],
)
def test_a_quantized_expert_is_named_with_its_format_and_the_remedy(
    kind: str, command: str, llama: Suite, tmp_path: Path
) -> None:
    codes, entry, words, remedy = KINDS[kind]
    expert = quantize(llama.experts[0].path, tmp_path / "expert", codes, entry)
    models = [{"model": str(expert)}, {"model": str(llama.experts[1].path)}]
    recipe = write(document(llama, models=models, dtype="float32"), tmp_path / "recipe.yml")
    out = [tmp_path / "out"] if command == "merge" else []
    output = run(command, recipe, *out)
    assert f"{expert} is quantized ({words}" in output
    assert remedy in output
    assert ("FineGrainedFP8Config" in output) == ("FineGrainedFP8Config" in remedy)
    assert output.count("is quantized") == 1
    assert "Complete the checkpoint" not in output
    assert "shapes other than" not in output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["float32", None])
@pytest.mark.parametrize("kind", [kind for kind, (_, entry, *_) in KINDS.items() if entry is not None])
def test_the_method_refuses_it_through_mergekit_yaml(
    kind: str, dtype: str | None, llama: Suite, tmp_path: Path
) -> None:
    codes, entry, words, _ = KINDS[kind]
    expert = quantize(llama.experts[0].path, tmp_path / "expert", codes, entry)
    recipe = document(llama, models=[{"model": str(expert)}], dtype=dtype)
    with pytest.raises(ValueError, match=f"{expert} must hold plain weights; it is quantized .{words}"):
        mergekit_yaml(recipe, tmp_path / "out")
    assert not list(tmp_path.glob("out/*.safetensors"))


@pytest.mark.parametrize("kind", ["int8 without an entry", "fp8 without an entry", "gptq without an entry"])
def test_the_method_sees_scales_beside_weights(kind: str, llama: Suite, tmp_path: Path) -> None:
    expert = quantize(llama.experts[0].path, tmp_path / "expert", KINDS[kind][0])
    recipe = document(llama, models=[{"model": str(expert)}], dtype="float32")
    with pytest.raises(ValueError, match="must hold plain weights; it is quantized"):
        mergekit_yaml(recipe, tmp_path / "out")
    files = document(
        llama,
        base_model=str(llama.base.path / "model.safetensors"),
        models=[{"model": str(expert / "model.safetensors")}],
    )
    with pytest.raises(ValueError, match="must hold plain weights; it is quantized"):
        mergekit_pytorch(files, tmp_path / "out")


@pytest.mark.parametrize("kind", ["integers", "fp8 without scales", "eetq without an entry", "vptq without an entry"])
def test_the_method_sees_the_dtypes_on_disk(kind: str, llama: Suite, tmp_path: Path) -> None:
    """`dtype` has made floats of them before the method gets a tensor."""
    expert = quantize(llama.experts[0].path, tmp_path / "expert", KINDS[kind][0])
    recipe = document(llama, models=[{"model": str(expert)}], dtype="float32")
    with pytest.raises(ValueError, match=f"{expert} must hold plain weights; it is quantized .{KINDS[kind][2]}"):
        mergekit_yaml(recipe, tmp_path / "out")
    assert not list(tmp_path.glob("out/*.safetensors"))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_files_of_codes_are_refused_by_mergekit_pytorch(suffix: str, tmp_path: Path) -> None:
    base = {"layer.weight": torch.randn(8, 8, generator=torch.Generator().manual_seed(0))}
    save_file(base, tmp_path / "base.safetensors")
    codes, file = {"layer.weight": base["layer.weight"].to(torch.float8_e4m3fn)}, tmp_path / f"codes.{suffix}"
    save_file(codes, file) if suffix == "safetensors" else torch.save(codes, file)
    recipe = {"merge_method": "ace", "base_model": str(tmp_path / "base.safetensors"), "models": [{"model": str(file)}]}
    with pytest.raises(ValueError, match=f"{file} must hold plain weights; it is quantized .float8_e4m3fn"):
        mergekit_pytorch(recipe | {"dtype": "float32"}, tmp_path / "out")
    output = run("check", write(recipe, tmp_path / "recipe.yml"))
    assert "from_pretrained" not in output  # it loads folders


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_the_method_refuses_8_bit_floats_from_python(dtype: torch.dtype | None) -> None:
    base = torch.eye(4)
    experts = [base.to(torch.float8_e4m3fn), base + 1]
    with pytest.raises(ValueError, match=r"layer.weight must hold plain weights; 1 has torch.float8_e4m3fn"):
        merge_tensors([base, *experts], "ace", base_index=0, name="layer.weight", dtype=dtype)


@pytest.mark.parametrize("command", ["check", "merge"])
def test_adapters_on_a_quantized_base(command: str, llama: Suite, tmp_path: Path) -> None:
    base = quantize(llama.base.path, tmp_path / "base8", kinds.bitsandbytes_int8, INT8)
    adapter = add_adapter(llama.base.path, tmp_path / "adapter", rank=2, targets=["q_proj"])
    recipe = document(llama, models=[{"model": f"{base}+{adapter}"}])
    out = [tmp_path / "out"] if command == "merge" else []
    output = run(command, write(recipe, tmp_path / "r.yml"), *out, "--lora-merge-cache", tmp_path / "cache")
    assert f"{base}, the base of the adapter {adapter}, is quantized (bitsandbytes int8" in output
    assert not (tmp_path / "cache").exists()


def test_an_entry_that_was_left_over_says_so(llama: Suite, tmp_path: Path) -> None:
    expert = quantize(llama.experts[0].path, tmp_path / "expert", lambda name, weight: {name: weight}, INT8)
    output = run("check", write(document(llama, models=[{"model": str(expert)}]), tmp_path / "r.yml"))
    assert "Its tensors look plain: if they are, remove the entry (config.json has quantization_config)" in output


@pytest.mark.parametrize(
    ("configuration", "form"),
    [
        ({"quantization_config": {"quant_method": "mxfp4"}}, "MXFP4"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "fp8"),
        ({"llm_config": {"quantization_config": {"quant_method": "awq", "bits": 4}}}, "AWQ 4-bit"),
        ({"thinker_config": {"text_config": {"quantization_config": {"quant_method": "gptq"}}}}, "GPTQ"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "MLX 4-bit"),
        ({"quantization_config": {"quant_method": "exl2", "bits": 4.5}}, "exl2"),
    ],
)
def test_entries_of_other_formats(configuration: dict[str, Any], form: str) -> None:
    told = from_configuration(configuration)
    assert told is not None
    assert told.format == form


def test_names_of_every_architecture_are_plain() -> None:
    assert from_names(row.name for row in owners.read()) is None


def test_plain_configurations_and_names_are_plain() -> None:
    assert from_configuration({"quantization_config": None, "quantization": {}}) is None
    # Weights that only sound like scales.
    names = [
        "q.norm.scale",
        "q.weight",
        "logit_scale",
        "model.embed_scale",
        "blocks.0.ls1.scale",
        "down_blocks.0.conv.weight",
        "x.rotary.scales",
    ]
    assert from_names(names) is None


@pytest.mark.parametrize(
    "names",
    [
        ["experts.gate_up_proj_blocks", "experts.gate_up_proj_scales"],
        ["experts.down_proj", "experts.down_proj_scale_inv"],
        ["q.weight", "q.weight_scale", "q.weight_scale_2", "q.input_scale"],
        ["q.weight", "q.scales", "q.biases"],
        ["q.weight._data", "q.weight._scale"],
        ["q._weight_qdata", "q._weight_scale"],
        ["q.weight", "q.scale_inv"],
        ["q.weight", "q.weight.scale"],
        ["q.weight", "q.scale_weight"],
        ["q.dense_weights", "q.row_offsets"],
        ["q.q_weight", "q.q_scale", "q.q_invperm"],
        ["q.trellis", "q.suh", "q.svh"],
        ["q.Qidxs", "q.SU", "q.SV"],
    ],
)
def test_names_of_other_formats(names: list[str]) -> None:
    assert from_names(names) is not None
