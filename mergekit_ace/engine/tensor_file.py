"""A safetensors file that is written while its tensors are merged: one at a time, and none is kept.

The safetensors library writes a file from all of its tensors at once. What a merge will write is planned, so the header
can go first; a worker then holds one tensor in place of a whole file of them, which is gigabytes of a large model.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from mergekit_ace.checkpoints.fingerprint import file_digest
from mergekit_ace.checkpoints.headers import safetensors_name
from mergekit_ace.engine.receipt import temporary_name
from mergekit_ace.engine.shards import OutputTensor

_ALIGNMENT = 8
_PIECE = 1 << 24


def layout(tensors: Iterable[OutputTensor]) -> list[OutputTensor]:
    """The order of tensors in a file: the widest numbers first, so that every one begins at a multiple of its width."""
    return sorted(tensors, key=lambda tensor: -_dtype(tensor).itemsize)


class TensorFile:
    """Writes a file in a thread of its own; `finish` gives it its name when all of it is on the disk.

    A block that ends with an error leaves no file. One that ends well leaves a file without its name, to be finished by
    this thread or another one.

    Args:
        file: where to.
        planned: what will be written, in the order of `layout`.

    Raises:
        OSError: of the file system, naming the file, from `write` or `finish`; nothing is left then.
    """

    def __init__(self, file: Path, planned: Sequence[OutputTensor]) -> None:
        self._file = file
        self._partial = temporary_name(file)
        self._planned = tuple(planned)
        self._written: list[OutputTensor] = []
        self._digest = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="writing")
        self._pending: Future[None] | None = None
        self.waited = 0.0
        """Seconds that `write` has waited."""

    def __enter__(self) -> TensorFile:
        beginning = header(self._planned)
        self._stream: BinaryIO = self._partial.open("wb")
        try:
            self._append(beginning)
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is not None:
            self._thread.shutdown(wait=True)
            self._discard()

    def write(self, tensor: OutputTensor, values: Tensor) -> None:
        """Hand over the next tensor; waits until the one before it is written.

        Args:
            tensor: of those planned, after the last one; some may be left out.
            values: of its shape and dtype, not to be modified afterwards.
        """
        started = time.perf_counter()
        self._settle()
        self.waited += time.perf_counter() - started
        self._written.append(tensor)
        self._pending = self._thread.submit(self._write, values)

    def finish(self) -> str:
        """Wait until all of the file is on the disk, and give it its name.

        Returns:
            Its SHA-256; empty where no tensor was written, and no file is.
        """
        try:
            self._thread.shutdown(wait=True)
            self._settle()
            if not self._written:
                return ""
            with naming(self._file):
                return self._complete()
        finally:
            self._discard()

    def _discard(self) -> None:
        """Close the file and remove it, unless it has its name by now."""
        try:
            with naming(self._file):
                self._stream.close()  # which writes what is buffered, and fails where the disk is full
        finally:
            self._partial.unlink(missing_ok=True)

    def _complete(self) -> str:
        complete = len(self._written) == len(self._planned)
        if not complete:
            # In the place of the header that was planned, which is longer.
            self._stream.seek(0)
            self._stream.write(header(self._written, len(header(self._planned))))
        self._stream.flush()
        os.fsync(self._stream.fileno())
        sha256 = self._digest.hexdigest() if complete else file_digest(self._partial)
        self._partial.replace(self._file)
        return sha256

    def _settle(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _write(self, values: Tensor) -> None:
        stored = values.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        with naming(self._file):
            for start in range(0, len(stored), _PIECE):
                self._append(stored[start : start + _PIECE].numpy().data)

    def _append(self, content: bytes | memoryview) -> None:
        self._stream.write(content)
        self._digest.update(content)


@contextlib.contextmanager
def naming(file: Path) -> Iterator[None]:
    """Have errors of a stream, such as that of a full disk, name the file."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(file)) from error


def header(tensors: Sequence[OutputTensor], length: int | None = None) -> bytes:
    """What a safetensors file begins with: the size of the description, and the description, padded with spaces.

    Args:
        tensors: in the order of the file.
        length: in bytes, of the whole; the least that it fits in if None. Both are multiples of 8.
    """
    description: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for tensor, start in zip(tensors, _starts(tensors), strict=True):
        description[tensor.name] = {
            "dtype": safetensors_name(_dtype(tensor)),
            "shape": tensor.shape,
            "data_offsets": [start, start + tensor.nbytes],
        }
    content = json.dumps(description, separators=(",", ":"), ensure_ascii=False).encode()
    size = -(-len(content) // _ALIGNMENT) * _ALIGNMENT if length is None else length - _ALIGNMENT
    return size.to_bytes(_ALIGNMENT, "little") + content.ljust(size)


def described(name: str, tensor: Tensor) -> OutputTensor:
    """A tensor's name, dtype and shape."""
    return OutputTensor(name=name, dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape))


def _starts(tensors: Sequence[OutputTensor]) -> Iterator[int]:
    start = 0
    for tensor in tensors:
        yield start
        start += tensor.nbytes


def _dtype(tensor: OutputTensor) -> torch.dtype:
    dtype = getattr(torch, tensor.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype
