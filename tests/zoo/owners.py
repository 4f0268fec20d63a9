"""Which module owns each tensor of transformers' architectures: what a name can be checked against.

    python -m tests.zoo.owners

writes `owners.txt` beside this file: for every architecture that transformers can build from its default configuration
(on the meta device, two layers), the tensors of two and more axes, one of each name, with the kind of module that owns
it. Building them all takes minutes, reading the file none; `test_treatments.py` builds some of them again.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

FILE = Path(__file__).with_name("owners.txt")
Owner = Literal["linear", "head", "embedding", "parameter", "buffer"]

_WITH_HEADS_FIRST = (
    *("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MASKED_LM", "PRETRAINING"),
    *("SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION"),
)
_DEPTHS = {
    *("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers"),
    *("num_decoder_layers", "num_encoder_layers"),
}


@dataclass(frozen=True)
class Owned:
    """A tensor and the kind of module that owns it; a `head` is a linear layer with one output for each word."""

    owner: Owner
    shape: tuple[int, ...]
    architecture: str
    name: str

    def __str__(self) -> str:
        return "\t".join([self.owner, "x".join(map(str, self.shape)), self.architecture, self.name])


def read() -> list[Owned]:
    """What the file holds."""
    rows = []
    for line in FILE.read_text(encoding="utf-8").splitlines():
        owner, shape, architecture, name = line.split("\t")
        rows.append(Owned(owner, tuple(map(int, shape.split("x"))), architecture, name))  # type: ignore[arg-type]
    return rows


def owned(architecture: str) -> Iterator[Owned]:
    """The tensors of two and more axes of an architecture, as transformers builds it."""
    model = _built(architecture)
    tables = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    vocabulary = max(tables, default=0)
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, tensor in module.named_parameters(recurse=False):
            if tensor.ndim >= 2:
                yield Owned(_owner(module, tensor, vocabulary), tuple(tensor.shape), architecture, prefix + name)
        for name, tensor in module.named_buffers(recurse=False):
            if tensor.ndim >= 2 and tensor.is_floating_point():
                yield Owned("buffer", tuple(tensor.shape), architecture, prefix + name)


def _owner(module: nn.Module, tensor: torch.Tensor, vocabulary: int) -> Owner:
    kinds = {kind.__name__ for kind in type(module).__mro__}
    if tensor.ndim == 2 and kinds & {"Embedding", "QuantEmbedding"}:
        return "embedding"
    if tensor.ndim == 2 and kinds & {"Linear", "Conv1D", "QuantLinear"}:
        # Small configurations and those of images have tables too; no vocabulary is smaller than this.
        return "head" if len(tensor) == vocabulary >= 5000 else "linear"
    return "parameter"


def _built(architecture: str) -> nn.Module:
    configuration = CONFIG_MAPPING[architecture]()
    mappings = [getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING", {}) for task in _WITH_HEADS_FIRST]
    mapping = next(m for m in (*mappings, modeling_auto.MODEL_MAPPING) if type(configuration) in m)
    model = mapping[type(configuration)]
    _make_shallow(configuration)
    with torch.device("meta"):
        built: nn.Module = (model[0] if isinstance(model, tuple) else model)._from_config(configuration)
    return built


def _make_shallow(configuration: Any) -> None:
    for name, value in list(vars(configuration).items()):
        if isinstance(value, transformers.PretrainedConfig):
            _make_shallow(value)
        elif name in _DEPTHS and isinstance(value, int) and value > 2:
            setattr(configuration, name, 2)


def _all() -> Iterator[Owned]:
    seen: set[tuple[str, str]] = set()
    for architecture in sorted(CONFIG_MAPPING):
        try:
            rows = list(owned(architecture))
        except Exception as error:  # one that needs other packages, or that has no model of its own
            print(f"{architecture}: {type(error).__name__}")
            continue
        for row in rows:
            # One of each name, numbers and the outer modules aside.
            short = re.sub(r"\d+", "0", ".".join(row.name.split(".")[-3:]))
            if (row.owner, short) not in seen and 0 not in row.shape:
                seen.add((row.owner, short))
                yield row


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    rows = sorted(_all(), key=lambda row: (row.owner, row.name))
    FILE.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} tensors")
