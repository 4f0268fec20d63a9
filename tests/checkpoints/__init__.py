"""Makers of small real checkpoints: a transformers model of random weights, and experts made from it.

`FAMILIES[name]` knows how to build one architecture and which of its tensors are tables or kernels; `make_suite`
writes a base and its experts to disk; `add_adapter` writes a LoRA adapter, `save_tokenizer` a tokenizer.
"""

from tests.checkpoints.adapters import add_adapter
from tests.checkpoints.experts import Update, updates_for
from tests.checkpoints.families import FAMILIES
from tests.checkpoints.family import Family
from tests.checkpoints.storage import Storage, edit_tensors, read_tensors, save_model
from tests.checkpoints.suite import Suite, make_suite
from tests.checkpoints.tokenizers import save_tokenizer

__all__ = [
    "FAMILIES",
    "Family",
    "Storage",
    "Suite",
    "Update",
    "add_adapter",
    "edit_tensors",
    "make_suite",
    "read_tensors",
    "save_model",
    "save_tokenizer",
    "updates_for",
]
