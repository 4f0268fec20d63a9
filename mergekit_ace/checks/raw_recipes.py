"""Recipes of mergekit-pytorch, whose models are single files of tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelPath, dtype_from_name
from safetensors import safe_open

from mergekit_ace.checkpoints.headers import TensorHeader, read_file
from mergekit_ace.checks.buffers import agree, differing_buffers
from mergekit_ace.checks.files import check_file_of_tensors
from mergekit_ace.checks.prefixes import longer_names_remedy
from mergekit_ace.checks.quantized import quantized
from mergekit_ace.recipe.failures import READING
from mergekit_ace.recipe.findings import Finding

_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_KEYS = ("merge_method", "models", "parameters", "dtype", "base_model", "out_dtype")
_MOST_NAMES = 3
# Its models' names are parsed once more on the way: as a revision, an adapter, or what JSON cannot hold.
_UNREAD_SIGNS = (" ", '"', "@", "+")

Headers = Mapping[str, TensorHeader]


def is_raw(document: Mapping[str, Any]) -> bool:
    """Whether a recipe's models are files."""
    names = [name for name in model_files(document) if name]
    return bool(names) and all(Path(name).is_file() or name.lower().endswith(_SUFFIXES) for name in names)


def model_files(document: Mapping[str, Any]) -> list[str]:
    """The base, where there is one, and the models as listed."""
    models = document.get("models")
    listed = [entry.get("model") for entry in models if isinstance(entry, Mapping)] if isinstance(models, list) else []
    named = [document.get("base_model"), *listed]
    return list(dict.fromkeys(name for name in named if isinstance(name, str)))


def check_raw(document: Mapping[str, Any]) -> Iterator[Finding]:
    """What is wrong with the files that a recipe of mergekit-pytorch names."""
    for key in document:
        if key not in _KEYS:
            yield Finding(
                level="warning",
                what=f"mergekit-pytorch does not read {key!r}: it merges files of tensors and knows no tokenizers, "
                "layers or templates",
                remedy="Remove it, or name the models' folders and run mergekit-yaml.",
            )
    names = model_files(document)
    for name in names:
        if any(sign in name for sign in _UNREAD_SIGNS):
            yield Finding(
                level="error",
                what=f"mergekit-pytorch reads no file whose path holds a space, a double quote, @ or +; got {name}",
                remedy="Rename it, or make a link to it without them.",
            )
    broken = [finding for name in names for finding in check_file_of_tensors(Path(name))]
    broken += [] if broken else [f for name in names for f in quantized(ModelPath(path=name), name)]
    yield from broken
    if broken:
        return
    headers = {name: read_file(Path(name)) for name in names}
    base = document.get("base_model") if isinstance(document.get("base_model"), str) else None
    yield from _check_names(headers, base)
    yield from _check_shapes(headers)
    yield from _check_buffers(headers)  # in contrast to mergekit-yaml, mergekit-pytorch casts none of them to dtype
    yield from _check_precision(headers, document.get("dtype"))


def _check_names(headers: Mapping[str, Headers], base: str | None) -> Iterator[Finding]:
    experts = {name: held for name, held in headers.items() if name != base} or headers
    merged = dict.fromkeys(tensor for held in experts.values() for tensor in held)
    missing = {name: [tensor for tensor in merged if tensor not in held] for name, held in headers.items()}
    renamed = {name: found for name, held in headers.items() if (found := longer_names_remedy(missing[name], held))}
    for name in renamed or [name for name in missing if missing[name]]:
        why, remedy = renamed.get(name) or (
            "",
            "Run mergekit-pytorch with --tensor-intersection to leave them out, or with --tensor-union to merge them.",
        )
        yield Finding(
            level="error",
            what=f"{name} lacks {_some(missing[name])}, which other models have" + (f": {why}" if why else ""),
            remedy=remedy,
        )
    lost = [tensor for tensor in (headers[base] if base else {}) if tensor not in merged]
    if lost:
        yield Finding(
            level="warning",
            what=f"{base} has {_some(lost)}, which no expert has: mergekit-pytorch leaves them out of the merged file",
            remedy="Copy them into the merged file if it needs them.",
        )


def _check_shapes(headers: Mapping[str, Headers]) -> Iterator[Finding]:
    first = next(iter(headers))
    for name, held in headers.items():
        wrong = [
            f"{tensor} {header.shape} for {headers[first][tensor].shape}"
            for tensor, header in held.items()
            if tensor in headers[first] and header.shape != headers[first][tensor].shape
        ]
        if wrong:
            yield Finding(
                level="error",
                what=f"{name} has other shapes than {first}: {_some(wrong)}",
                remedy="Merge fine-tunes of one base model; mergekit-pytorch aligns no vocabularies.",
            )


def _check_buffers(headers: Mapping[str, Headers]) -> Iterator[Finding]:
    names = dict.fromkeys(
        tensor for held in headers.values() for tensor, header in held.items() if not header.dtype.is_floating_point
    )
    differing = []
    for tensor in names:
        values = [_read(Path(name), tensor) for name, held in headers.items() if tensor in held]
        if not agree(values):
            differing.append(tensor)
    if differing:
        yield differing_buffers(differing)


def _read(file: Path, tensor: str) -> torch.Tensor:
    if file.name.lower().endswith(".safetensors"):
        with safe_open(file, framework="pt") as stored:
            found: torch.Tensor = stored.get_tensor(tensor)
            return found
    tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=_can_be_mapped(file))
    return torch.as_tensor(tensors[tensor])


def _can_be_mapped(file: Path) -> bool:
    with file.open("rb") as stream:  # torch's present format is a zip archive; the old one is not
        return stream.read(4) == b"PK\x03\x04"


def _check_precision(headers: Mapping[str, Headers], name: Any) -> Iterator[Finding]:
    try:
        dtype = dtype_from_name(name)
    except READING:  # reported by the check of values
        return
    if dtype is None:
        return
    stored = Counter(header.dtype for held in headers.values() for header in held.values())
    finer = [kind for kind in stored if kind.is_floating_point and torch.finfo(kind).eps < torch.finfo(dtype).eps]
    if finer:
        yield Finding(
            level="warning",
            what=f"dtype: {name} rounds tensors that are stored in {str(finer[0]).removeprefix('torch.')} before the "
            "merge: updates are small and lose most of their digits",
            remedy=f"Set dtype: float32 and out_dtype: {name}.",
        )


def _some(names: Sequence[str]) -> str:
    listed = ", ".join(names[:_MOST_NAMES])
    return listed if len(names) <= _MOST_NAMES else f"{listed} and {len(names) - _MOST_NAMES} more"
