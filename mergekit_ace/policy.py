"""Which treatment a tensor gets, by its name, shape and vocabulary axis, and why."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["matrix", "stack", "average", "base"]
Choice = Literal["method", "average", "base"]
InputAxis = Literal["last", "first"]


@dataclass(frozen=True, kw_only=True)
class Treatment:
    """How one tensor is merged.

    Attributes:
        kind: `matrix`: by the method; `stack`: each `[out, in]` slice by the method; `average`: base + weighted mean of
            the task vectors; `base`: kept as in the base.
        reason: for people, in a few words.
    """

    kind: Kind
    reason: str


# Tables looked up by an index, and heads that score the vocabulary. Where mergekit gives no vocabulary axis (position
# and token-type tables, mergekit-pytorch, calls from Python) the name is all there is. Whole dotted components only.
_TABLES = (
    r"embed_tokens|tok_embeddings|word_embeddings|wte|wpe|embed_in|embed_positions?|position_embeddings?|"
    r"token_type_embeddings?|embeddings\.weight|shared|relative_attention_bias|embeddings|patch_position_embeddings?"
)
_HEADS = r"lm_head|embed_out|output_layer|output_projection_vocabulary"
_VOCABULARY_NAME = re.compile(rf"(?:^|\.)(?:{_TABLES}|{_HEADS})(?:\.(?:weight|decoder\.weight))?$")
_STACKED_EXPERTS = re.compile(r"(?:^|[._])experts?(?:[._]|$)")
_STATE_MATRIX = re.compile(r"(?:^|\.)A_log$")
_TEXT_PROJECTION = re.compile(r"(?:^|\.)text_projection(?:\.weight)?$")


def is_embedding(name: str, vocabulary_axis: int | None) -> bool:
    """Whether a tensor is an embedding table (token, position, token type) or a head that scores the vocabulary."""
    return vocabulary_axis is not None or _VOCABULARY_NAME.search(name) is not None


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
