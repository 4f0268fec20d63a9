"""A file of tensors in torch's own format (`--no-safe-serialization`), which is written from all of them at once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from mergekit_ace.checkpoints.fingerprint import file_digest
from mergekit_ace.engine.receipt import temporary_name
from mergekit_ace.engine.shards import OutputTensor
from mergekit_ace.engine.tensor_file import naming


class Pickle:
    """Collects tensors, and writes them at the end; otherwise as `TensorFile`."""

    def __init__(self, file: Path, planned: Sequence[OutputTensor]) -> None:
        self._file = file
        self._tensors: dict[str, Tensor] = {}
        self.waited = 0.0
        """As `TensorFile.waited`."""

    def __enter__(self) -> Pickle:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """As `TensorFile.__exit__`: there is nothing to leave behind."""

    def write(self, tensor: OutputTensor, values: Tensor) -> None:
        """As `TensorFile.write`."""
        self._tensors[tensor.name] = values

    def finish(self) -> str:
        """As `TensorFile.finish`."""
        if not self._tensors:
            return ""
        partial = temporary_name(self._file)
        try:
            with naming(self._file):
                torch.save(self._tensors, partial)
                with partial.open("rb") as stream:
                    os.fsync(stream.fileno())
            sha256 = file_digest(partial)
            partial.replace(self._file)
        finally:
            partial.unlink(missing_ok=True)
        return sha256
