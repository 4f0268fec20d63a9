"""The next tensor's inputs, read while the present one is merged."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType

from mergekit.common import ModelReference
from torch import Tensor

from mergekit_ace.recipe.plan import Plan, PlannedTensor
from mergekit_ace.recipe.tensor_cost import tensor_cost

LOG = logging.getLogger("mergekit_ace")

Gathered = Mapping[ModelReference, Tensor]


class ReadingAhead:
    """Hands out the inputs of tensors one after the other, and reads one ahead in a thread of its own.

    Args:
        plan: the recipe's, open.
        tensors: what is to be read, in order.
        memory: bytes that may be used; where two tensors' inputs exceed it, one is read at a time. No bound if None.
    """

    def __init__(self, plan: Plan, tensors: Sequence[PlannedTensor], memory: int | None = None) -> None:
        self._plan = plan
        self._tensors = list(tensors)
        self._place = 0
        self._memory = memory
        self._ahead: Future[Gathered] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reading")
        self._files = ExitStack()
        self.waited = 0.0
        """Seconds that `next` has taken."""

    def __enter__(self) -> ReadingAhead:
        # Entered in the reading thread: mergekit keeps its open files by thread.
        self._thread.submit(lambda: self._files.enter_context(self._plan.reader())).result()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._ahead is not None:
            self._ahead.cancel()
        self._thread.submit(self._files.close)
        self._thread.shutdown(wait=True, cancel_futures=False)

    def next(self) -> Gathered:
        """The inputs of the next tensor.

        Raises:
            ValueError, RuntimeError, KeyError, OSError, SafetensorError: it cannot be read.
        """
        started = time.perf_counter()
        reading = self._ahead or self._read(self._place)
        gathered = reading.result()
        self.waited += time.perf_counter() - started
        self._place += 1
        self._ahead = None
        if self._place < len(self._tensors) and self._fits(self._place):
            self._ahead = self._read(self._place)
        return gathered

    def _read(self, place: int) -> Future[Gathered]:
        return self._thread.submit(_gather, self._tensors[place])

    def _fits(self, place: int) -> bool:
        if self._memory is None:
            return True
        near = self._tensors[max(0, place - 2) : place + 1]
        *before, present, ahead = (tensor_cost(self._plan, tensor, tensor.output) for tensor in near)
        being_written = sum(cost.written for cost in before)
        fits = present.inputs + present.workspace + being_written + ahead.inputs <= self._memory
        if not fits:
            LOG.warning(
                "%s and the tensor after it do not fit into a worker's memory (--memory): one is read at a time",
                self._tensors[place - 1].name,
                extra={"cause": "memory"},
            )
        return fits


def _gather(tensor: PlannedTensor) -> Gathered:
    gathered = tensor.gather()
    for part in gathered.values():
        if part.device.type == "cpu" and part.is_contiguous():
            # A tensor of a mapped file is read where its pages are touched: here, and not in the merge.
            part.flatten()[:: max(1, _PAGE // part.element_size())].sum()
    return gathered


_PAGE = 4096
