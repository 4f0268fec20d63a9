"""Names, shapes and dtypes of a checkpoint's tensors, from file headers alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError

import torch
from mergekit.io import ShardedTensorIndex
from safetensors import safe_open

from mergekit_ace.damaged_files import message_of
from mergekit_ace.git_lfs import pointer_words

# Not every torch that is allowed has them all.
_DTYPE_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F4": "float4_e2m1fn_x2",
}
_INDEX = ".index.json"
_MOST_NAMES = 3


@dataclass(frozen=True, kw_only=True)
class TensorHeader:
    """Shape and dtype of one tensor in a file."""

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


def header_of(shape: Iterable[int], dtype: str) -> TensorHeader:
    """A header from what safetensors writes: `dtype` is one of its names, such as `BF16`."""
    name = _DTYPE_NAMES.get(dtype, "uint8")
    return TensorHeader(shape=tuple(shape), dtype=getattr(torch, name, torch.uint8))


def safetensors_name(dtype: torch.dtype) -> str:
    """What safetensors calls a dtype, such as `BF16`.

    Raises:
        ValueError: it has no name for it.
    """
    name = str(dtype).removeprefix("torch.")
    for known, ours in _DTYPE_NAMES.items():
        if ours == name:
            return known
    raise ValueError(f"dtype must be one that safetensors stores; got {name}. Set out_dtype")


def read_headers(index: ShardedTensorIndex) -> Mapping[str, TensorHeader]:
    """Every tensor of a checkpoint by its name on disk; reads no weight of a safetensors file.

    Raises:
        OSError, RuntimeError: a shard is missing, truncated, no checkpoint, or lacks a tensor that the index promises;
            the message names it.
    """
    headers: dict[str, TensorHeader] = {}
    for shard in index.shards:
        path = Path(index.base_path) / shard.filename
        held = _file_headers(path, is_safetensors=index.is_safetensors)
        absent = [name for name in shard.contained_keys if name not in held]
        if absent:
            raise RuntimeError(
                f"{path} must hold the tensors that the index lists for it; it lacks {', '.join(absent[:_MOST_NAMES])}"
                + (f" and {len(absent) - _MOST_NAMES} more" if len(absent) > _MOST_NAMES else "")
            )
        # mergekit sees what the index lists, and nothing else that a shard may hold.
        headers |= {name: held[name] for name in shard.contained_keys}
    return headers


def read_folder(folder: Path) -> Mapping[str, TensorHeader]:
    """Every tensor of a model's folder, by way of mergekit's own choice among the files in it.

    Raises:
        OSError, RuntimeError: as `read_headers`; also where mergekit finds no model. The message names the file.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        file, index = folder / name, folder / (name + _INDEX)
        if index.is_file():
            _require_index(index)
            break
        if file.is_file():
            return _file_headers(file, is_safetensors=file.suffix == ".safetensors")
    return read_headers(ShardedTensorIndex.from_disk(str(folder)))


def unlisted_tensors(folder: Path) -> Mapping[str, str]:
    """Tensors that a folder's safetensors files hold and its index does not list, with their files; mergekit sees none.

    Raises:
        OSError, RuntimeError: as `read_headers`.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return {}
    listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    files = sorted(folder.glob("model*.safetensors"))
    return {name: file.name for file in files for name in read_file(file) if name not in listed}


def read_file(file: Path) -> Mapping[str, TensorHeader]:
    """Every tensor of a single file, a pickle unless it is called `.safetensors`.

    Raises:
        OSError, RuntimeError: as `read_headers`.
    """
    return _file_headers(file, is_safetensors=file.name.lower().endswith(".safetensors"))


def _require_index(index: Path) -> None:
    if (words := pointer_words(index)) is not None:
        raise RuntimeError(f"{index} must list the tensors of its shards; {words}")
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(listed, dict) or not listed:
            raise TypeError("weight_map is no mapping, or lists nothing")
        wrong = next((name for name, file in listed.items() if not isinstance(file, str)), None)
        if wrong is not None:
            raise TypeError(f"weight_map has {listed[wrong]!r} for the file of {wrong}")
    except (ValueError, KeyError, TypeError) as error:
        raise RuntimeError(f"{index} must be JSON with a weight_map; {message_of(error)}") from error


def _file_headers(path: Path, *, is_safetensors: bool) -> Mapping[str, TensorHeader]:
    status = path.stat()  # FileNotFoundError names the file
    return _cached(path, is_safetensors, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _cached(path: Path, is_safetensors: bool, size: int, changed: int) -> Mapping[str, TensorHeader]:
    """A merge asks for the same headers up to three times. Keyed by size and time, for files that are written anew."""
    if (words := pointer_words(path)) is not None:
        raise RuntimeError(f"{path} must hold tensors; {words}")
    return _safetensors(path) if is_safetensors else _pickle(path)


def _safetensors(path: Path) -> dict[str, TensorHeader]:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            return {name: header_of(part.get_shape(), part.get_dtype()) for name, part in slices.items()}
    except FileNotFoundError:
        raise
    except Exception as error:  # safetensors names what is wrong, but not the file
        raise RuntimeError(f"{path} must be a whole safetensors file; {error}") from error


def _pickle(path: Path) -> dict[str, TensorHeader]:
    try:
        tensors = torch.load(path, map_location="meta", weights_only=True)
    except FileNotFoundError:
        raise
    except UnpicklingError as error:  # torch's own message explains how to run the code
        raise RuntimeError(
            f"{path} must be a whole pickle of tensors; it is damaged or holds more, and nothing in it was run. "
            "Take the model as safetensors, from a source that you trust"
        ) from error
    except Exception as error:  # zip, pickle and torch each have their own
        raise RuntimeError(f"{path} must be a whole PyTorch checkpoint; {message_of(error)}") from error
    held = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}
    if not held or "state_dict" in tensors:
        # mergekit lists what is in state_dict, and does not find it when it merges.
        inner = next((key for key, value in tensors.items() if isinstance(value, dict)), "state_dict")
        keys = ", ".join(map(str, list(tensors)[:_MOST_NAMES]))
        raise RuntimeError(
            f"{path} must hold its tensors by name; it holds {keys}. Save them alone: "
            f"safetensors.torch.save_file(torch.load(FILE)[{inner!r}], NEW)"
        )
    return {name: TensorHeader(shape=tuple(tensor.shape), dtype=tensor.dtype) for name, tensor in held.items()}
