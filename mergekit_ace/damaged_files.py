"""What reading a damaged checkpoint raises, and the message for it."""

from __future__ import annotations

from collections.abc import Mapping
from pickle import UnpicklingError
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError

# What reading one damaged, truncated or incomplete checkpoint may raise, by way of mergekit, safetensors and torch.
READING = (ValueError, RuntimeError, KeyError, OSError, EOFError, SafetensorError, UnpicklingError)


def message_of(error: BaseException) -> str:
    """The error's own words; its type too where those alone do not tell what happened (a key, a library's code)."""
    if isinstance(error, UnpicklingError):  # torch's own message explains how to run the code
        return (
            "a pickle is damaged or holds more than tensors; nothing in it was run. Take that model as safetensors; "
            "mergekit-ace check names it"
        )
    if isinstance(error, ValidationError):  # pydantic's own words name its types and its site
        return "; ".join(_of_entry(entry) for entry in error.errors(include_url=False))
    words = str(error).strip()
    if isinstance(error, MemoryError) and not words:
        return "out of memory"
    if isinstance(error, KeyError | SafetensorError | EOFError) or not words:
        return f"{type(error).__name__}: {words}".rstrip(": ")
    return words


def _of_entry(entry: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in entry["loc"])
    words = str(entry["msg"]).removeprefix("Value error, ")
    return f"{where}: {words}; got {entry['input']!r}" if where else words
