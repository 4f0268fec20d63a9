"""Checkpoints as quantization tools leave them: codes for weights, scales beside them, an entry in the config."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.checkpoints.storage import edit_tensors

Codes = Callable[[str, Tensor], dict[str, Tensor]]


def bitsandbytes_int8(name: str, weight: Tensor) -> dict[str, Tensor]:
    scale = weight.float().abs().amax(1)
    codes = (weight.float() / scale[:, None] * 127).round().to(torch.int8)
    return {name: codes, name.replace("weight", "SCB"): scale, f"{name}_format": torch.tensor(0, dtype=torch.uint8)}


def bitsandbytes_nf4(name: str, weight: Tensor) -> dict[str, Tensor]:
    return {
        name: torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8),
        f"{name}.absmax": torch.zeros(weight.numel() // 64, dtype=torch.uint8),
        f"{name}.quant_map": torch.zeros(16),
        f"{name}.quant_state.bitsandbytes__nf4": torch.zeros(80, dtype=torch.uint8),
    }


def packed(name: str, weight: Tensor) -> dict[str, Tensor]:
    """GPTQ and AWQ."""
    rows, columns = weight.shape
    owner = name.removesuffix("weight")
    return {
        f"{owner}qweight": torch.zeros(columns // 8, rows, dtype=torch.int32),
        f"{owner}qzeros": torch.zeros(1, rows // 8, dtype=torch.int32),
        f"{owner}scales": torch.zeros(1, rows, dtype=torch.float16),
    }


def float8(name: str, weight: Tensor) -> dict[str, Tensor]:
    return {name: weight.to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1, 1)}


def float8_alone(name: str, weight: Tensor) -> dict[str, Tensor]:
    """Without scales, as a cast leaves it."""
    return {name: weight.to(torch.float8_e4m3fn)}


def float8_converted(name: str, weight: Tensor) -> dict[str, Tensor]:
    """The codes as bfloat16, as a careless conversion leaves them: only the scales tell."""
    return {name: weight.to(torch.float8_e4m3fn).bfloat16(), f"{name}_scale_inv": torch.ones(1, 1)}


def module_scales(name: str, weight: Tensor) -> dict[str, Tensor]:
    """As DeepSeek's own programs write them, converted: the scale has the module's name and not the weight's."""
    return {name: weight.to(torch.float8_e4m3fn).bfloat16(), name.replace("weight", "scale"): torch.ones(1, 1)}


def integers_with_scales(name: str, weight: Tensor) -> dict[str, Tensor]:
    """EETQ."""
    return {name: (weight * 100).to(torch.int8), f"{name}_scales": torch.ones(weight.shape[0])}


def vector_codes(name: str, weight: Tensor) -> dict[str, Tensor]:
    """VPTQ."""
    owner = name.removesuffix("weight")
    return {f"{owner}indices": torch.zeros(1, 4, 8, dtype=torch.int32), f"{owner}centroids.weight": torch.zeros(1, 16)}


def compressed_tensors(name: str, weight: Tensor) -> dict[str, Tensor]:
    rows, columns = weight.shape
    return {f"{name}_packed": torch.zeros(rows, columns // 8, dtype=torch.int32), f"{name}_scale": torch.ones(rows, 1)}


def plain_integers(name: str, weight: Tensor) -> dict[str, Tensor]:
    return {name: (weight * 100).to(torch.int8)}


def quantize(model: Path, folder: Path, codes: Codes, entry: Mapping[str, Any] | None = None) -> Path:
    """Copy a model and put codes in place of its layers' matrices; `entry` becomes its `quantization_config`."""
    shutil.copytree(model, folder)
    with edit_tensors(folder / "model.safetensors") as tensors:
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            tensors |= codes(name, tensors.pop(name))
    if entry is not None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": dict(entry)}))
    return folder
