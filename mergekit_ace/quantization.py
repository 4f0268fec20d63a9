"""How a quantized checkpoint is told from a plain one: by its configuration, and by the tensors beside its weights.

The codes of a quantized weight are numbers of another scale, and often of another shape, than the weight. Converted to
a float dtype they merge without an error into weights that are hundreds of times too large.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_LOAD = 'AutoModelForCausalLM.from_pretrained("{path}"'
_BITSANDBYTES = f'{_LOAD}).dequantize().save_pretrained("FOLDER")'
_BY_CONFIGURATION = f'{_LOAD}, quantization_config={{config}}(dequantize=True)).save_pretrained("FOLDER")'

# What transformers can turn back into plain weights, by `quant_method`, and the line that does it.
_LINES = {
    "bitsandbytes": _BITSANDBYTES,
    "higgs": _BITSANDBYTES,
    "fp8": _BY_CONFIGURATION.replace("{config}", "FineGrainedFP8Config"),
    "mxfp4": _BY_CONFIGURATION.replace("{config}", "Mxfp4Config"),
    "compressed-tensors": f"{_LOAD}, quantization_config=CompressedTensorsConfig(run_compressed=False))"
    '.save_pretrained("FOLDER")',
}

# Names that no plain checkpoint uses, and the format that does.
_TELLING_NAMES = (
    (re.compile(r"\.SCB$"), "bitsandbytes", "bitsandbytes int8"),
    (
        re.compile(r"\.quant_state\.bitsandbytes__(?:nf4|fp4)$|\.quant_map$|\.absmax$"),
        "bitsandbytes",
        "bitsandbytes 4-bit",
    ),
    (re.compile(r"(?:\.|_)(?:qweight|qzeros)$"), "gptq", "GPTQ or AWQ"),
    (re.compile(r"(?:\.|_)weight_packed$"), "compressed-tensors", "compressed-tensors"),
    (re.compile(r"\.weight\._data$"), "quanto", "quanto"),
    (re.compile(r"\.W_q$"), "hqq", "HQQ"),
    (re.compile(r"\.codebooks$"), "aqlm", "AQLM"),
    (re.compile(r"_weight_qdata$"), "torchao", "torchao"),
    (re.compile(r"\.(?:res_)?centroids\.weight$"), "vptq", "VPTQ"),
    (re.compile(r"\.dense_weights$"), "spqr", "SpQR"),
    (re.compile(r"\.(?:q_weight|q_invperm)$"), "exl2", "EXL2"),
    (re.compile(r"\.trellis$"), "exl3", "EXL3"),
    (re.compile(r"\.Qidxs$"), "quip", "QuIP#"),
)
# Tensors that scale or shift the codes beside them, by what is left of the name without the suffix.
_SCALE = re.compile(r"^(?P<weight>.+?)(?:_scale_inv|_scales?(?:_\d)?|_zero_point|\.scale(?:_inv)?)$")
_SCALE_OF_MODULE = re.compile(r"^(?P<module>.+)\.(?:scale|scale_inv|scale_weight)$")
_MLX_SCALES = re.compile(r"^(?P<module>.+)\.scales$")
_BLOCKS = re.compile(r"^(?P<stem>.+)_blocks$")

_ENTRIES = ("quantization_config", "compression_config", "quantization")
# Files in which older tools keep what belongs into config.json.
CONFIGURATION_FILES = {
    "quantize_config.json": ("gptq", "GPTQ"),
    "quant_config.json": ("awq", "AWQ"),
    "hf_quant_config.json": ("modelopt", "ModelOpt"),
}


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """A format of quantized weights, and how it was told.

    Attributes:
        method: as `quant_method` in a configuration.
        format: its name for people.
        evidence: where it shows: an entry of a file, or a tensor.
    """

    method: str
    format: str
    evidence: str

    def remedy(self, path: str | None) -> str:
        """What to do about a checkpoint, with the line that does it where transformers can.

        Args:
            path: of its folder, or its name on the hub; None for a single file, which transformers does not load.
        """
        line = None if path is None else _LINES.get(self.method)
        if line is None:
            return "Merge the checkpoint that it was quantized from, and quantize the result."
        line = line.replace("{path}", str(path))
        return (
            f"Dequantize it first: {line}, or better merge the checkpoint that it was quantized from: dequantized "
            "weights keep the rounding of the codes, which can be larger than an update."
        )


def from_configuration(configuration: Mapping[str, Any]) -> Quantization | None:
    """Read a model's `config.json`; None where it names no quantization."""
    for where, holder in _holders(configuration, ""):
        for key in _ENTRIES:
            entry = holder.get(key)
            if isinstance(entry, Mapping) and entry:
                return _from_entry(entry, f"config.json has {where}{key}")
    return None


def from_names(names: Iterable[str]) -> Quantization | None:
    """Read the names of a checkpoint's tensors; None where no codes and no scales are among them."""
    present = set(names)
    for name in sorted(present):
        for pattern, method, form in _TELLING_NAMES:
            if pattern.search(name):
                return Quantization(method=method, format=form, evidence=f"it holds {name}")
        scale = _SCALE.match(name)
        # `logit_scale` and its kind are weights of their own: nothing is called `logit`.
        if scale and scale["weight"] in present:
            return _scaled(name, scale["weight"])
        of_module = _SCALE_OF_MODULE.match(name)
        if of_module and f"{of_module['module']}.weight" in present:
            return _scaled(name, f"{of_module['module']}.weight")
        blocks = _BLOCKS.match(name)
        if blocks and f"{blocks['stem']}_scales" in present:
            return Quantization(method="mxfp4", format="MXFP4", evidence=f"it holds {name}")
        mlx = _MLX_SCALES.match(name)
        if mlx and {f"{mlx['module']}.weight", f"{mlx['module']}.biases"} <= present:
            return Quantization(method="mlx", format="MLX", evidence=f"it holds {name}")
    return None


def from_dtypes(dtypes: Mapping[str, tuple[str, int]]) -> Quantization | None:
    """Read dtypes as torch names them, and numbers of dimensions; None where all weights are plain numbers.

    Integers are plain in buffers, so of those only matrices called `weight` count.
    """
    for name, (dtype, dimensions) in dtypes.items():
        if dtype.startswith(("float8", "float4")):
            return Quantization(method=dtype, format=dtype, evidence=f"{name} is {dtype}")
        if name.endswith("weight") and dimensions >= 2 and dtype.startswith(("int", "uint")):
            return Quantization(method=dtype, format=f"{dtype} codes", evidence=f"{name} is {dtype}")
    return None


def _holders(configuration: Mapping[str, Any], where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """A configuration and those of the models in it, such as `text_config`, with their place."""
    yield where, configuration
    for key, value in configuration.items():
        if str(key).endswith("_config") and key not in _ENTRIES and isinstance(value, Mapping):
            yield from _holders(value, f"{where}{key}.")


def _scaled(scale: str, weight: str) -> Quantization:
    # Of the formats that scale codes under a weight's own name, transformers' 8-bit floats alone call it this.
    method = "fp8" if scale == f"{weight}_scale_inv" else "of an unnamed kind"
    return Quantization(method=method, format="codes with scales", evidence=f"{scale} scales {weight}")


def _from_entry(entry: Mapping[str, Any], evidence: str) -> Quantization:
    method = str(entry.get("quant_method") or "").lower()
    if method.startswith("bitsandbytes") or (not method and (entry.get("load_in_8bit") or entry.get("load_in_4bit"))):
        kind = "int8" if entry.get("load_in_8bit") else f"4-bit {entry.get('bnb_4bit_quant_type') or ''}".strip()
        return Quantization(method="bitsandbytes", format=f"bitsandbytes {kind}", evidence=evidence)
    if not method:
        method = str(entry.get("quant_algo") or ("mlx" if "group_size" in entry else "of an unnamed kind")).lower()
    names = {"gptq": "GPTQ", "awq": "AWQ", "mxfp4": "MXFP4", "hqq": "HQQ", "aqlm": "AQLM", "mlx": "MLX"}
    bits = entry.get("bits")
    form = names.get(method, method) + (f" {bits}-bit" if isinstance(bits, int) else "")
    return Quantization(method=method, format=form, evidence=evidence)
