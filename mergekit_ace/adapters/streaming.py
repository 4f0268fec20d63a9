"""A safetensors file written one tensor at a time: its own writers want all tensors in memory at once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# What a tensor takes in the header beside its name: dtype, up to eight sizes and two offsets, each of twenty digits.
_MOST_FOR_A_TENSOR = 300
_WORD = 8


class TensorFile:
    """A safetensors file whose header, which stands in front, is written last, into space that is kept for it.

    The format allows spaces at the header's end. Used as a context; the file is whole when the context ends well.

    Args:
        path: of the file.
        names: at least those of the tensors to come.
        metadata: of the file.
    """

    def __init__(self, path: Path, names: Mapping[str, object] | list[str], metadata: Mapping[str, str]) -> None:
        self._path = path
        self._header: dict[str, object] = {"__metadata__": dict(metadata)}
        longest = len(json.dumps(self._header)) + sum(len(json.dumps(name)) + _MOST_FOR_A_TENSOR for name in names)
        self._kept = (longest // _WORD + 1) * _WORD
        self._written = 0
        self._file: BinaryIO | None = None

    def __enter__(self) -> TensorFile:
        self._file = self._path.open("wb")
        self._file.seek(_WORD + self._kept)
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor."""
        assert self._file is not None
        stored = tensor.detach().cpu().contiguous()
        # Through bytes: bfloat16 has no NumPy type.
        size = self._file.write(stored.view(-1).view(torch.uint8).numpy().data if stored.numel() else b"")
        self._header[name] = {
            "dtype": _NAMES[stored.dtype],
            "shape": list(stored.shape),
            "data_offsets": [self._written, self._written + size],
        }
        self._written += size

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._file is not None
        with self._file as file:
            if kind is None:
                text = json.dumps(self._header).encode().ljust(self._kept)
                assert len(text) == self._kept
                file.seek(0)
                file.write(self._kept.to_bytes(_WORD, "little") + text)
