"""Which treatment a tensor gets, by its name, shape and vocabulary axis, and why."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["matrix", "stack", "average", "base", "buffer"]
Choice = Literal["method", "average", "base"]
InputAxis = Literal["last", "first"]


@dataclass(frozen=True, kw_only=True)
class Treatment:
    """How one tensor is merged.

    Attributes:
        kind: `matrix`: by the method; `stack`: each `[out, in]` slice by the method; `average`: base + weighted mean of
            the task vectors; `base`: kept as in the base; `buffer`: kept, whatever it holds.
        reason: for people, in a few words.
    """

    kind: Kind
    reason: str


# Tables looked up by an index, and heads that score the vocabulary. Where mergekit gives no vocabulary axis (position
# and token-type tables, mergekit-pytorch, calls from Python) the name is all there is: its last component, whole.
_TABLE = re.compile(r"^(?:.+_)?emb(?:ed(?:ding)?s?)?(?:_.+)?$|^(?:wte|wpe|shared|relative_attention_bias|lm_head)$")
_NOT_A_TABLE = re.compile(r"_(?:proj|project|projection|norm|ln)$")
_HEAD = re.compile(r"^(?:model\.)?(?:output|proj_out)$|(?:^|\.)(?:lm_head|predictions)\.decoder$")
_STACKED_EXPERTS = re.compile(r"(?:^|[._])experts?(?:[._]|$)")
_STATE_MATRIX = re.compile(r"(?:^|\.)A_log$")
_TEXT_PROJECTION = re.compile(r"(?:^|\.)text_projection(?:\.weight)?$")
# Constants that some checkpoints carry as floating-point tensors; -1e9 in float16 is an infinity that means no harm.
_BUFFER = re.compile(r"(?:^|\.)(?:masked_bias|inv_freq)$")


def is_embedding(name: str, vocabulary_axis: int | None) -> bool:
    """Whether a tensor is an embedding table (token, position, token type) or a head that scores the vocabulary."""
    if vocabulary_axis is not None:
        return True
    owner = name.removesuffix(".weight")
    last = owner.rpartition(".")[2]
    return _HEAD.search(owner) is not None or (_TABLE.match(last) is not None and _NOT_A_TABLE.search(last) is None)


def treatment(
    name: str,
    shape: Sequence[int],
    *,
    vocabulary_axis: int | None = None,
    embeddings: Choice = "average",
    matrices: Choice = "method",
) -> Treatment:
    """Decide how a tensor is merged.

    Args:
        name: its name in the output model; may be empty.
        shape: of the base's tensor, its matrices turned so that inputs come last.
        vocabulary_axis: mergekit's, where it gives one.
        embeddings: the recipe's choice for embedding tables and output heads.
        matrices: the recipe's choice for all other matrices, stacked ones too.
    """
    if _BUFFER.search(name):
        return Treatment(kind="buffer", reason="a buffer, not a weight")
    if len(shape) >= 2 and is_embedding(name, vocabulary_axis) and embeddings != "method":
        return Treatment(kind=embeddings, reason=f"embedding table or output head (embeddings: {embeddings})")
    if _TEXT_PROJECTION.search(name):
        return Treatment(kind="average", reason="CLIP's text projection, averaged as published")
    if 0 in shape:
        return Treatment(kind="base", reason="empty")
    if _STATE_MATRIX.search(name):
        return Treatment(kind="average", reason="state-space decay rates, not a linear map")
    stacked = len(shape) == 3 and _STACKED_EXPERTS.search(name) is not None
    if (stacked or len(shape) == 2) and matrices != "method":
        return Treatment(kind=matrices, reason=f"matrix (matrices: {matrices})")
    if stacked:
        return Treatment(kind="stack", reason="stacked expert matrices, slice by slice")
    if len(shape) != 2:
        return Treatment(kind="average", reason="vector or scalar" if len(shape) < 2 else "convolution kernel or table")
    if shape[0] == 1:
        # The centered second moment of one row is zero, so there is nothing to weigh the experts by.
        return Treatment(kind="average", reason="a single row")
    return Treatment(kind="matrix", reason="matrix")
