"""Checkpoints with a real model's names and shapes and made-up weights, written shard by shard.

No more than one shard is in memory at a time. Names and shapes are taken from transformers, of a model without storage.
"""

import json
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.speed.layers import RELATIVE_SIZES

_RMS = 0.02
_SHARD_BYTES = 1_000_000_000
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model's configuration as a function of its depth, and the dtype that it is stored in."""

    name: str
    layers: int
    dtype: torch.dtype
    config: Callable[[int], transformers.PretrainedConfig]
    model: type[transformers.PreTrainedModel]


def _llama(
    hidden: int, heads: int, *, intermediate: int = 8192, vocabulary: int = 128256
) -> Callable[[int], transformers.PretrainedConfig]:
    def config(layers: int) -> transformers.PretrainedConfig:
        return transformers.LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=8,
            tie_word_embeddings=True,
        )

    return config


def _roberta(layers: int) -> transformers.PretrainedConfig:
    return transformers.RobertaConfig(
        vocab_size=30522,
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=12,
        max_position_embeddings=514,
    )


ROBERTA = Architecture(
    name="RoBERTa 384",
    layers=6,
    dtype=torch.float32,
    config=_roberta,
    model=transformers.RobertaForSequenceClassification,
)
LLAMA_1B = Architecture(
    name="Llama-3.2-1B",
    layers=16,
    dtype=torch.bfloat16,
    config=_llama(2048, 32),
    model=transformers.LlamaForCausalLM,
)
LLAMA_3B = Architecture(
    name="Llama-3.2-3B",
    layers=28,
    dtype=torch.bfloat16,
    config=_llama(3072, 24),
    model=transformers.LlamaForCausalLM,
)
LLAMA_70B = Architecture(
    name="Llama-3-70B without its vocabulary",
    layers=80,
    dtype=torch.bfloat16,
    config=_llama(8192, 64, intermediate=28672, vocabulary=64),
    model=transformers.LlamaForCausalLM,
)
"""To learn what its layers cost: nine copies of its embedding tables would be most of the files."""


def write_base(architecture: Architecture, layers: int, folder: Path) -> Path:
    """Normal weights, norms of one, biases of zero."""

    def initial(name: str, shape: torch.Size) -> Tensor:
        if len(shape) == 1:
            return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        return torch.randn(shape, generator=_generator("base", name)).mul_(_RMS)

    return _write(architecture, layers, folder, initial)


def write_expert(architecture: Architecture, layers: int, folder: Path, base: Path, place: int) -> Path:
    """The base plus an update of everything: of a real one's size, its columns of very different size.

    The last makes its spectrum steep, at a small part of what a product of factors would cost.
    """
    read = _reader(base)

    def updated(name: str, shape: torch.Size) -> Tensor:
        generator = _generator(str(place), name)
        update = torch.randn(shape, generator=generator)
        columns = torch.randperm(shape[-1], generator=generator) / shape[-1]
        update.mul_((1 + 77 * columns) ** -0.8)
        size = RELATIVE_SIZES[place % len(RELATIVE_SIZES)] * _RMS * math.sqrt(update.numel())
        return update.mul_(size / update.norm()).add_(read(name))

    return _write(architecture, layers, folder, updated)


def _write(architecture: Architecture, layers: int, folder: Path, values: Callable[[str, torch.Size], Tensor]) -> Path:
    folder.mkdir(parents=True)
    config = architecture.config(layers)
    with torch.device("meta"):
        model = architecture.model(config)
    config.architectures = [architecture.model.__name__]
    config.dtype = architecture.dtype
    config.save_pretrained(folder)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    shards = list(_shards(shapes, architecture.dtype.itemsize))
    weight_map = {}
    for place, names in enumerate(shards):
        file = f"model-{place + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        tensors = {name: values(name, shapes[name]).to(architecture.dtype) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    size = architecture.dtype.itemsize * sum(shape.numel() for shape in shapes.values())
    (folder / _INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))
    return folder


def _shards(shapes: dict[str, torch.Size], itemsize: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        if names and size + shape.numel() * itemsize > _SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += shape.numel() * itemsize
    yield names


def _reader(folder: Path) -> Callable[[str], Tensor]:
    """Single tensors of a checkpoint by name."""
    weight_map = json.loads((folder / _INDEX).read_text())["weight_map"]

    def read(name: str) -> Tensor:
        with safe_open(folder / weight_map[name], framework="pt") as file:
            return file.get_tensor(name)

    return read


def _generator(*parts: str) -> torch.Generator:
    """The same numbers for the same model and tensor name, whatever else is written."""
    return torch.Generator().manual_seed(zlib.crc32("/".join(parts).encode()))
