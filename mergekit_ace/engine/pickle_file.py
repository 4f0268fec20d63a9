"""A file of tensors in torch's own format (`--no-safe-serialization`), which is written from all of them at once."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from mergekit_ace.checkpoints.fingerprint import file_digest
from mergekit_ace.engine.receipt import temporary_name
from mergekit_ace.engine.shards import OutputTensor


class Pickle:
    """Collects tensors, and writes them at the end; otherwise as `TensorFile`."""

    def __init__(self, file: Path, planned: Sequence[OutputTensor]) -> None:
        self._file = file
        self._tensors: dict[str, Tensor] = {}
        self.waited = 0.0
        """As `TensorFile.waited`."""
        self.sha256 = ""
        """As `TensorFile.sha256`."""

    def __enter__(self) -> Pickle:
        return self

    def write(self, tensor: OutputTensor, values: Tensor) -> None:
        """As `TensorFile.write`."""
        self._tensors[tensor.name] = values

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is not None or not self._tensors:
            return
        started = time.perf_counter()
        partial = temporary_name(self._file)
        try:
            torch.save(self._tensors, partial)
            with partial.open("rb") as stream:
                os.fsync(stream.fileno())
            self.sha256 = file_digest(partial)
            partial.replace(self._file)
        finally:
            partial.unlink(missing_ok=True)
        self.waited += time.perf_counter() - started
