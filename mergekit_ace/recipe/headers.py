"""Names, shapes and dtypes of a checkpoint's tensors, from file headers alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from mergekit.io import ShardedTensorIndex
from safetensors import safe_open

from mergekit_ace.recipe.failures import message_of

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True, kw_only=True)
class TensorHeader:
    """What a file says about one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Its size on disk."""
        return self.elements * self.dtype.itemsize


def find_header(
    headers: Mapping[str, TensorHeader], name: str, aliases: Sequence[str] | None, tied_names: Sequence[str] | None
) -> TensorHeader | None:
    """A tensor's header under the first of its names that a checkpoint has, in the order in which mergekit tries them.

    Args:
        headers: of one checkpoint.
        name: the tensor's own.
        aliases: its other names, as mergekit's architectures list them.
        tied_names: of the tensors that may stand for it.
    """
    names = (name, *(aliases or ()), *(tied_names or ()))
    return next((headers[known] for known in names if known in headers), None)


def read_headers(index: ShardedTensorIndex) -> Mapping[str, TensorHeader]:
    """Every tensor of a checkpoint by its name on disk; reads no weight of a safetensors file.

    Raises:
        OSError, SafetensorError, RuntimeError: a shard is missing, truncated or not a checkpoint; the message names it.
    """
    headers: dict[str, TensorHeader] = {}
    for shard in index.shards:
        path = Path(index.base_path) / shard.filename
        headers |= _safetensors(path) if index.is_safetensors else _pickle(path)
    return headers


def _safetensors(path: Path) -> dict[str, TensorHeader]:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            return {
                name: TensorHeader(shape=tuple(part.get_shape()), dtype=_DTYPES.get(part.get_dtype(), torch.uint8))
                for name, part in slices.items()
            }
    except FileNotFoundError:
        raise
    except Exception as error:  # safetensors says what is wrong, but not with which file
        raise RuntimeError(f"{path} must be a whole safetensors file; {error}") from error


def _pickle(path: Path) -> dict[str, TensorHeader]:
    try:
        tensors = torch.load(path, map_location="meta", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # zip, pickle and torch each have their own
        raise RuntimeError(f"{path} must be a whole PyTorch checkpoint; {message_of(error)}") from error
    tensors = tensors.get("state_dict", tensors)
    return {name: TensorHeader(shape=tuple(tensor.shape), dtype=tensor.dtype) for name, tensor in tensors.items()}
