"""One shard of a merge: read, merged, written, and recorded by a receipt."""

from __future__ import annotations

import contextlib
import logging
import platform
import socket
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from transformers.trainer_utils import set_seed

from mergekit_ace.engine.pickle_file import Pickle
from mergekit_ace.engine.plan import MergePlan
from mergekit_ace.engine.reading import ReadingAhead
from mergekit_ace.engine.receipt import Maker, Notice, Receipt, write_receipt
from mergekit_ace.engine.shards import OutputTensor, Shard
from mergekit_ace.engine.tensor_file import TensorFile, described, layout
from mergekit_ace.engine.unfinished import Unfinished
from mergekit_ace.recipe.plan import Plan, PlannedTensor

OnTensor = Callable[[str, float], None]
"""Told each tensor's name and seconds, when it is merged."""


@dataclass(frozen=True, kw_only=True)
class _Merged:
    """A file whose tensors are handed over, not yet under its name; seconds that its maker took, and that it waited."""

    file: TensorFile | Pickle
    names: set[str]
    seconds: float
    reading: float
    warnings: tuple[Notice, ...]


class ShardMaker:
    """Makes shards of one merge, in this process and on one device; ends as a context manager.

    Args:
        plan: the recipe's, open.
        work: the merge.
        folder: where the shards go.
        receipts: where their receipts go.
        memory: bytes that this maker may use; reads no tensor ahead that would exceed it. No bound if None.
        on_tensor: told of every tensor that is merged.
    """

    def __init__(
        self,
        plan: Plan,
        work: MergePlan,
        folder: Path,
        receipts: Path,
        *,
        memory: int | None = None,
        on_tensor: OnTensor = lambda name, seconds: None,
    ) -> None:
        self._plan = plan
        self._work = work
        self._folder = folder
        self._receipts = receipts
        self._memory = memory
        self._on_tensor = on_tensor
        self._tensors = {tensor.name: tensor for tensor in plan.tensors}
        self._behind = ThreadPoolExecutor(1, thread_name_prefix="finishing")
        self._before: Unfinished | None = None

    def __enter__(self) -> ShardMaker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Wait until the file that is being finished has its receipt, or cannot have one."""
        self._behind.shutdown(wait=True)

    def make(self, shard: Shard) -> Unfinished:
        """Merge a shard's tensors, and finish the file before it; making a shard twice gives the same file.

        The shard's file is brought to the disk in a thread, gets its name and then its receipt: it is one file at a
        time that is finished while the next one is merged.

        Raises:
            ValueError, RuntimeError, OSError: as reading, the merge method and the file system; for an input that
                changed since the merge was planned; and for a result of another shape or dtype than was planned.
        """
        started = time.perf_counter()
        outputs, file, names = layout(shard.tensors), self._folder / shard.file, set()
        planned = [self._tensors[output.name] for output in outputs]
        opened = TensorFile if file.suffix == ".safetensors" else Pickle
        with opened(file, outputs) as writing:
            with noticed() as notices, ReadingAhead(self._plan, planned, self._memory) as inputs:
                self._require_unchanged(shard)
                for output, tensor in zip(outputs, planned, strict=True):
                    began = time.perf_counter()
                    self._seed(tensor)
                    merged = tensor.merge(inputs.next())
                    if merged is not None:
                        _require_as_planned(output, described(output.name, merged))
                        writing.write(output, merged)
                        names.add(output.name)
                    self._on_tensor(output.name, time.perf_counter() - began)
                self._require_unchanged(shard)
            made = _Merged(
                file=writing,
                names=names,
                seconds=time.perf_counter() - started,
                reading=inputs.waited,
                warnings=tuple(notices),
            )
            if self._before is not None:
                self._before.receipt()
        self._before = Unfinished(self._behind, lambda waited: self._finish(shard, made, waited))
        if isinstance(writing, Pickle):  # it holds its tensors until it is finished
            self._before.receipt()
        return self._before

    def _finish(self, shard: Shard, made: _Merged, waited: Callable[[], float]) -> Receipt:
        sha256 = made.file.finish()
        receipt = Receipt(
            key=self._work.key(shard),
            file=shard.file,
            tensors=tuple(tensor for tensor in shard.tensors if tensor.name in made.names),
            absent=tuple(tensor.name for tensor in shard.tensors if tensor.name not in made.names),
            sha256=sha256,
            changed=(self._folder / shard.file).stat().st_mtime_ns if sha256 else 0,
            inputs=self._work.sources(shard),
            seconds=round(made.seconds + (wait := waited()), 3),
            reading=round(made.reading, 3),
            writing=round(made.file.waited + wait, 3),
            warnings=made.warnings,
            maker=this_maker(self._plan.device),
        ).sealed()
        write_receipt(receipt, self._receipts)
        return receipt

    def _seed(self, tensor: PlannedTensor) -> None:
        """Methods that draw numbers draw the same ones for a tensor whoever makes it, and after what."""
        seed = self._plan.options.random_seed
        if seed is not None:
            set_seed((seed + zlib.crc32(tensor.name.encode())) % 2**32)

    def _require_unchanged(self, shard: Shard) -> None:
        """Raise unless the inputs are the files that were planned with, by size and time of change."""
        for model in self._plan.models:
            folder = self._plan.folder(model)
            for key in shard.reads:
                if not key.startswith(f"{model}/"):
                    continue
                file, planned = folder / key.removeprefix(f"{model}/"), self._work.inputs[key]
                with contextlib.suppress(OSError):  # a file that is gone is named where it is read
                    found = file.stat()
                    if (found.st_size, found.st_mtime_ns) != (planned.size, planned.changed):
                        raise ValueError(f"inputs must not change during a merge; {file} did. Run the merge again")


def _require_as_planned(planned: OutputTensor, made: OutputTensor) -> None:
    if made != planned:
        raise RuntimeError(
            f"{planned.name}: the merged tensor must be {planned.dtype} {planned.shape} as planned; "
            f"got {made.dtype} {made.shape}"
        )


def this_maker(device: torch.device) -> Maker:
    """This process and its device."""
    processor = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    )
    return Maker(host=socket.gethostname(), processor=processor)


@contextlib.contextmanager
def noticed() -> Iterator[list[Notice]]:
    """Collect the warnings that are logged in the block, by this package or mergekit."""
    collector = _Collector(logging.WARNING)
    root = logging.getLogger()
    root.addHandler(collector)
    try:
        yield collector.notices
    finally:
        root.removeHandler(collector)


class _Collector(logging.Handler):
    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.notices: list[Notice] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        self.notices.append(Notice(cause=getattr(record, "cause", text), text=text))
