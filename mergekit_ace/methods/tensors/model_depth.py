"""How deep a model is: over how many blocks what is noise to an expert adds up."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

from mergekit.common import ModelReference

from mergekit_ace.checkpoints.sources import is_local, model_headers
from mergekit_ace.damaged_files import READING

_NUMBER = re.compile(r"\.(\d+)\.")
_IN_MEMORY: ContextVar[int | None] = ContextVar("depth of a model in memory", default=None)


def depth_of(models: Sequence[Hashable]) -> int | None:
    """How many blocks of the base follow one another: by its configuration, or else by the names of its tensors.

    Args:
        models: the base first; mergekit's references where they come from a recipe. Of models in memory,
            `model_in_memory` tells the names.

    Returns:
        None where neither tells.
    """
    if models and isinstance(models[0], ModelReference):
        return _depth(models[0])
    return _IN_MEMORY.get()


@contextmanager
def model_in_memory(names: Iterable[str]) -> Iterator[None]:
    """Within it, models that are no references have the depth that these names of tensors show: see `blocks_of`."""
    token = _IN_MEMORY.set(blocks_of(names))
    try:
        yield
    finally:
        _IN_MEMORY.reset(token)


def blocks_of(names: Iterable[str]) -> int | None:
    """How many blocks the names of a model's tensors show: `model.layers.0.`, `model.layers.1.`, ...

    Of several stacks, as of an encoder and a decoder, the deepest; numbers within a block, as of stacked experts, do
    not count.

    Args:
        names: of the tensors.

    Returns:
        None where no name has a number.
    """
    numbers = defaultdict(set)
    for name in names:
        if found := _NUMBER.search(name):
            numbers[name[: found.start()]].add(found[1])
    return max(map(len, numbers.values()), default=None)


@lru_cache(maxsize=64)
def _depth(base: ModelReference) -> int | None:
    try:
        depth = getattr(base.config().get_text_config(), "num_hidden_layers", None)
    except Exception:  # no configuration, as of a single file, or one that transformers does not know
        depth = None
    if isinstance(depth, int) and depth > 0:
        return depth
    try:
        return blocks_of(model_headers(base.model)) if is_local(base.model) else None
    except READING:  # what cannot be read ends the merge where it is read
        return None
