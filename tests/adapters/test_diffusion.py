"""The layouts of diffusion adapters, told by their keys; what is written is read again to the same updates."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_ace import merge_adapters
from mergekit_ace.factors.opening import adapter_from_tensors, open_adapter
from mergekit_ace.factors.tensors import AdapterError
from tests.adapters.makers import updates_of

LINEAR = "lora_unet_down_blocks_0_attentions_0_to_q"
CONVOLUTION = "lora_unet_down_blocks_0_resnets_0_conv1"
TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"
EMBEDDING_LAYER = "lora_unet_time_embedding_linear_1"


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def kohya(seed: int, rank: int, alpha: float) -> dict[str, Tensor]:
    tensors = {}
    for index, (module, m, n) in enumerate(((LINEAR, 12, 8), (TEXT, 20, 8), (EMBEDDING_LAYER, 16, 8))):
        tensors[f"{module}.lora_down.weight"] = drawn(rank, n, seed=seed + index)
        tensors[f"{module}.lora_up.weight"] = drawn(m, rank, seed=seed + index + 50)
        tensors[f"{module}.alpha"] = torch.tensor(alpha)
    tensors[f"{CONVOLUTION}.lora_down.weight"] = drawn(rank, 4, 3, 3, seed=seed + 7)
    tensors[f"{CONVOLUTION}.lora_up.weight"] = drawn(6, rank, 1, 1, seed=seed + 8)
    return tensors


def expected_of(tensors: dict[str, Tensor], module: str) -> Tensor:
    down, up = tensors[f"{module}.lora_down.weight"], tensors[f"{module}.lora_up.weight"]
    scale = float(tensors[f"{module}.alpha"]) / len(down) if f"{module}.alpha" in tensors else 1.0
    return scale * torch.einsum("mr...,rn...->mn...", up.expand(*up.shape[:2], *down.shape[2:]), down)


def test_kohya_is_read_and_an_average_is_written_as_kohya(tmp_path: Path) -> None:
    states = [kohya(0, rank=2, alpha=1.0), kohya(100, rank=3, alpha=6.0)]
    files = [tmp_path / f"style{i}.safetensors" for i in range(2)]
    for file, state in zip(files, states, strict=True):
        save_file(state, file)
    merged = merge_adapters(files, parameters={"matrices": "average"}, out=tmp_path / "out")
    written = load_file(tmp_path / "out" / "lora.safetensors")
    assert written.keys() == merged.tensors.keys()
    again = updates_of(open_adapter(tmp_path / "out" / "lora.safetensors"))
    for module in (LINEAR, TEXT, EMBEDDING_LAYER, CONVOLUTION):
        assert float(written[f"{module}.alpha"]) == len(written[f"{module}.lora_down.weight"])
        mean = sum(expected_of(state, module) for state in states) / 2
        torch.testing.assert_close(again[f"{module}.weight"], mean, atol=1e-5, rtol=1e-5)
    assert written[f"{CONVOLUTION}.lora_down.weight"].shape[1:] == (4, 3, 3)
    assert written[f"{CONVOLUTION}.lora_up.weight"].shape[2:] == (1, 1)


def test_a_layer_of_a_diffusion_model_is_no_table_by_its_name() -> None:
    merged = merge_adapters([kohya(0, rank=2, alpha=1.0), kohya(100, rank=2, alpha=2.0)])
    treatments = {weight.name: weight.treatment for weight in merged.report.weights}
    assert treatments[f"{EMBEDDING_LAYER}.weight"] == "matrix"
    assert treatments[f"{CONVOLUTION}.weight"] == "convolution kernel or table"


def test_lycoris_and_cp_kernels_are_converted_exactly() -> None:
    loha = {
        f"{LINEAR}.hada_w1_a": drawn(12, 2, seed=1),
        f"{LINEAR}.hada_w1_b": drawn(2, 8, seed=2),
        f"{LINEAR}.hada_w2_a": drawn(12, 2, seed=3),
        f"{LINEAR}.hada_w2_b": drawn(2, 8, seed=4),
        f"{LINEAR}.alpha": torch.tensor(6.0),
    }
    expected = 3 * (loha[f"{LINEAR}.hada_w1_a"] @ loha[f"{LINEAR}.hada_w1_b"])
    expected = expected * (loha[f"{LINEAR}.hada_w2_a"] @ loha[f"{LINEAR}.hada_w2_b"])
    torch.testing.assert_close(updates_of(adapter_from_tensors(loha, name="a"))[f"{LINEAR}.weight"], expected)
    lokr = {
        f"{LINEAR}.lokr_w1": drawn(3, 2, seed=1),
        f"{LINEAR}.lokr_w2_a": drawn(4, 2, seed=2),
        f"{LINEAR}.lokr_w2_b": drawn(2, 4, seed=3),
        f"{LINEAR}.alpha": torch.tensor(1.0),
    }
    expected = torch.kron(lokr[f"{LINEAR}.lokr_w1"], lokr[f"{LINEAR}.lokr_w2_a"] @ lokr[f"{LINEAR}.lokr_w2_b"]) / 2
    torch.testing.assert_close(updates_of(adapter_from_tensors(lokr, name="a"))[f"{LINEAR}.weight"], expected)
    kernel = {
        f"{CONVOLUTION}.lora_down.weight": drawn(2, 4, 1, 1, seed=1),
        f"{CONVOLUTION}.lora_mid.weight": drawn(2, 2, 3, 3, seed=2),
        f"{CONVOLUTION}.lora_up.weight": drawn(6, 2, 1, 1, seed=3),
        f"{CONVOLUTION}.alpha": torch.tensor(4.0),
    }
    down, mid, up = (kernel[f"{CONVOLUTION}.lora_{part}.weight"] for part in ("down", "mid", "up"))
    expected = 2 * torch.einsum("mi,ijkl,jn->mnkl", up[..., 0, 0], mid, down[..., 0, 0])
    torch.testing.assert_close(updates_of(adapter_from_tensors(kernel, name="a"))[f"{CONVOLUTION}.weight"], expected)


NEW, OLD = "unet.down_blocks.0.attentions.0.attn1.to_q", "unet.down_blocks.0.attentions.0.attn1.processor.to_q_lora"


def test_diffusers_is_read_in_its_older_and_newer_names_and_written_in_the_newer(tmp_path: Path) -> None:
    factors = [(drawn(2, 8, seed=seed), drawn(12, 2, seed=seed + 1)) for seed in (0, 10)]
    newer = {f"{NEW}.lora_A.weight": factors[0][0], f"{NEW}.lora_B.weight": factors[0][1]}
    older = {f"{OLD}.down.weight": factors[1][0], f"{OLD}.up.weight": factors[1][1]}
    metadata = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 6, "unet.use_rslora": False})}
    save_file(newer, tmp_path / "newer.safetensors", metadata=metadata)
    save_file(older, tmp_path / "older.safetensors")
    merge_adapters(
        [tmp_path / "newer.safetensors", tmp_path / "older.safetensors"],
        parameters={"matrices": "average"},
        out=tmp_path / "out",
    )
    written = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert written.keys() == {f"{NEW}.lora_A.weight", f"{NEW}.lora_B.weight"}
    expected = (3 * factors[0][1] @ factors[0][0] + factors[1][1] @ factors[1][0]) / 2
    torch.testing.assert_close(written[f"{NEW}.lora_B.weight"] @ written[f"{NEW}.lora_A.weight"], expected)


def test_layouts_are_not_mixed_and_what_is_no_adapter_is_refused() -> None:
    newer = {f"{NEW}.lora_A.weight": drawn(2, 8, seed=0), f"{NEW}.lora_B.weight": drawn(12, 2, seed=1)}
    with pytest.raises(AdapterError, match="number 1 has those of kohya, number 2 those of diffusers"):
        merge_adapters([kohya(0, rank=2, alpha=1.0), newer])
    with pytest.raises(AdapterError, match=r"must have the keys of peft, kohya or diffusers; it has 1, such as weight"):
        merge_adapters([{"weight": torch.ones(2)}])
    with pytest.raises(AdapterError, match="is DoRA's"):
        merge_adapters([kohya(0, rank=2, alpha=1.0) | {f"{LINEAR}.dora_scale": torch.ones(12, 1)}])
    with pytest.raises(AdapterError, match=r"must have lora_down and lora_up alone; it has diff"):
        merge_adapters([kohya(0, rank=2, alpha=1.0) | {"lora_unet_norm.diff": torch.ones(12)}])


def test_kohyas_factors_under_dotted_names_are_read_and_written() -> None:
    name = "diffusion_model.blocks.0.cross_attn.k"
    tensors = {
        key.replace(LINEAR, name): tensor for key, tensor in kohya(0, rank=2, alpha=1.0).items() if LINEAR in key
    }
    merged = merge_adapters([tensors], parameters={"matrices": "average"})
    assert merged.layout == "kohya"
    assert merged.tensors.keys() == tensors.keys()
    found = updates_of(adapter_from_tensors(merged.tensors, name="a"))[f"{name}.weight"]
    torch.testing.assert_close(found, expected_of(tensors, name))


def test_diffusers_names_may_hold_the_name_of_an_adapter() -> None:
    down, up = drawn(2, 8, seed=0), drawn(12, 2, seed=1)
    merged = merge_adapters([{f"{NEW}.lora_A.default.weight": down, f"{NEW}.lora_B.default.weight": up}])
    assert merged.tensors.keys() == {f"{NEW}.lora_A.weight", f"{NEW}.lora_B.weight"}
    found = merged.tensors[f"{NEW}.lora_B.weight"] @ merged.tensors[f"{NEW}.lora_A.weight"]
    torch.testing.assert_close(found, up @ down)


LOHA = {"hada_w1_a": (12, 2), "hada_w1_b": (2, 8), "hada_w2_a": (12, 2), "hada_w2_b": (2, 8)}
LOKR = {"lokr_w1_a": (3, 2), "lokr_w1_b": (2, 2), "lokr_w2": (4, 4)}
PAIR = {"lora_down.weight": (2, 8), "lora_up.weight": (12, 2)}
MISFITS: dict[str, tuple[dict[str, tuple[int, ...] | None], str]] = {
    "two alphas": ({**PAIR, "alpha": (2,)}, r"\.alpha must be one number; got shape \(2,\)"),
    "ranks": ({**PAIR, "lora_up.weight": (12, 3)}, "must have factors of one rank; got 2 and 3"),
    "vectors": ({**PAIR, "lora_down.weight": (8,)}, r"must be matrices; got shapes \(8,\) and \(12, 2\)"),
    "kernels": (
        {"lora_down.weight": (2, 8, 3, 3), "lora_up.weight": (12, 2, 3, 3)},
        r"must have a kernel of 1; got \(3, 3\)",
    ),
    "no factors": ({"alpha": ()}, "must have lora_down and lora_up alone; it has alpha"),
    "loha lacks a part": ({**LOHA, "hada_w2_b": None}, "it lacks hada_w2_b"),
    "loha of two ranks": ({**LOHA, "hada_w1_b": (3, 8)}, r"one rank; got \(12, 2\) of hada_w1_a and \(3, 8\)"),
    "loha of two shapes": ({**LOHA, "hada_w2_b": (2, 9)}, r"must have one shape; got \(12, 8\) and \(12, 9\)"),
    "loha with more": ({**LOHA, "scalar": ()}, "must have the parts of LoHa alone; it has scalar"),
    "lokr lacks a part": ({**LOKR, "lokr_w1_b": None}, "it lacks lokr_w1_b"),
    "lokr of two ranks": ({**LOKR, "lokr_w1_b": (1, 2)}, r"one rank; got \(3, 2\) of lokr_w1_a"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_parts_that_do_not_fit_are_named(case: str) -> None:
    shapes, words = MISFITS[case]
    tensors = {f"{LINEAR}.{part}": torch.ones(shape) for part, shape in shapes.items() if shape is not None}
    with pytest.raises(AdapterError, match=f"{LINEAR}.*{words}" if "alpha" not in case else words):
        merge_adapters([tensors])
