"""Adapters that leave their base as it is."""

from __future__ import annotations

from collections.abc import Iterable

from mergekit_ace.factors.model import Adapter, Update
from mergekit_ace.factors.tensors import AdapterError


def require_effect(adapters: Iterable[Adapter]) -> None:
    """Refuse an adapter whose every update is 0, which a merge would take for an expert.

    Reads an adapter up to its first update that is none.

    Raises:
        AdapterError: naming it.
    """
    for adapter in adapters:
        if adapter.replaced or adapter.tokens or adapter.bias_updates:
            continue
        if not any(_changes(update) for update in adapter.updates.values()):
            raise AdapterError(
                f"the adapter {adapter.name} does nothing: all of its {len(adapter.updates)} updates are 0, as before "
                "the first step of training. Check that it was trained, and saved after its training"
            )


def _changes(update: Update) -> bool:
    factors = update.read()
    return bool(factors.left.any()) and bool(factors.right.any())
