"""Warnings of a merge in mergekit's log: each cause once a merge, not once a tensor nor once a process."""

from __future__ import annotations

import logging
import re
import threading

LOG = logging.getLogger("mergekit_ace")

# What mergekit calls the groups that it checks once, before it plans the tensors of a merge.
_SLICE = re.compile(r"\.slices\[\d+\]$")


def begins_a_merge(group_name: str | None) -> bool:
    """Whether what mergekit checks is all of a slice or model, as it does before it plans the tensors of a merge."""
    return group_name is None or _SLICE.search(group_name) is not None


class MergeWarnings:
    """Logs the first message of each cause of a merge; thread-safe, one for each merge method.

    mergekit does not let a method know where a merge begins or ends. A merge begins where mergekit checks the
    inputs of whole models, where a tensor without a name is merged, and where a tensor is merged that this merge has
    merged already.
    """

    def __init__(self) -> None:
        self._logged: set[str] = set()
        self._tensors: set[str] = set()
        self._lock = threading.Lock()

    def inputs_checked(self, group_name: str | None) -> None:
        """Told that mergekit has checked the inputs of a group: a tensor, by its name, or all of a slice or model."""
        if begins_a_merge(group_name):
            with self._lock:
                self._begin()

    def merging(self, tensor: str | None) -> None:
        """A tensor is about to be merged."""
        with self._lock:
            if tensor is None or tensor in self._tensors or not self._tensors:
                self._begin()
            if tensor is not None:
                self._tensors.add(tensor)

    def warn(self, cause: str, message: str) -> None:
        """Warn, unless a message of the same cause was logged in this merge."""
        with self._lock:
            if cause in self._logged:
                return
            self._logged.add(cause)
        # By the cause, several processes that share a merge give it once together.
        LOG.warning("%s Logged once a merge; -v logs every tensor.", message, extra={"cause": cause})

    def _begin(self) -> None:
        self._logged.clear()
        self._tensors.clear()
