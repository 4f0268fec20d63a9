"""Which treatment a tensor gets, by its name, shape and vocabulary axis, and why."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["matrix", "stack", "head", "average", "base", "buffer"]
Choice = Literal["method", "auto", "average", "base"]
Heads = Literal["none", "named", "tied"]
"""Which tensors are output heads: none; those with the name of one; the token table too, which the head is tied to."""
InputAxis = Literal["last", "first"]


@dataclass(frozen=True, kw_only=True)
class Treatment:
    """How one tensor is merged.

    Attributes:
        kind: `matrix`: by the method; `stack`: each `[out, in]` slice by the method; `head`: by the method, as a linear
            map that scores the vocabulary; `average`: base + weighted mean of the task vectors; `base`: kept as in the
            base; `buffer`: kept, whatever it holds.
        reason: for people, in a few words.
    """

    kind: Kind
    reason: str


# Tables looked up by an index, and heads that score the vocabulary. Where mergekit gives no vocabulary axis (position
# and token-type tables, mergekit-pytorch, calls from Python) the name is all there is. Held against the modules of
# every architecture that transformers builds: tests/zoo/test_treatments.py.
_TABLE_WORDS = {"emb", "embd", "embed", "embeds", "embedding", "embeddings", "embedder", "table", "codebook"}
_TABLE_NAMES = re.compile(
    r"wte|wpe|shared|relative_attention_bias|bias_values|pe_k|reference_points|quer(?:y|ies)_feat(?:ure)?s?"
    r"|(?:\w+_)?tokens?|HashBucketCodepointEmbedder_\d+"
)
# Beside a word for tables these tell a linear map: one of embeddings, or one that embeds what is no index, unless it
# is of positions (`patch_embed`, but `patch_position_embeddings`).
_MAP_WORDS = {
    *("proj", "project", "projection", "projector", "dense", "linear", "mapping", "transformation"),
    "norm",
    "ln",
}
_NO_INDEX_WORDS = {"patch", "decoder", "predictor", "return", "state", "action", "unitseq"}
_POSITION_WORDS = {"pos", "position", "positions", "positional"}
_MAP_NAMES = {"class_embed", "enc_out_class_embed", "relative_pos_embeddings", "vision_embed_tokens", "inner2emb"}
_HEAD = re.compile(
    r"^(?:model\.)?(?:output|proj_out)$|^(?:decoder|transformer\.w)$|(?:^|\.)output_projection$|(?:^|[._])(?:head|predictions)\.decoder$"
    r"|(?:^|[._])lm_head(?:s\.\d+|\.out_proj)?$|(?:^|\.)(?:lm_loss|vocab_projector|pred_layer\.proj)$"
)
_STACKED_EXPERTS = re.compile(r"(?:^|[._])experts?(?:[._]|$)")
_STATE_MATRIX = re.compile(r"(?:^|\.)A_log$")
_TEXT_PROJECTION = re.compile(r"(?:^|\.)text_projection(?:\.weight)?$")
# Constants that some checkpoints carry as floating-point tensors. The infinities of masks mean no harm, be it that
# they are stored (`attn_mask` of CLIP's kind) or that -1e9 became one in float16.
_BUFFER = re.compile(
    r"(?:^|[._])(?:mask|masked_bias|inv_freq|(?:cos|sin)_cached|freqs_cis|position_ids|position_angles|eye)$"
    r"|(?:^|\.)(?:weight|bias)_integer$"
)
# Vectors of one kind side by side: biases of heads or experts, learned queries, offsets looked up by a distance.
_VECTORS = re.compile(
    r"(?:^|[._])(?:bias(?:es)?(?:_[uv])?|latents(?:_\dd)?|latent_query|pointer|rel_pos_[hw]|position_enc|pos_encoding)$"
    r"|\.(?:query|scale|log_scale|translate|D)$|(?:^|[._])norm\.(?:scale|shift)\.weight$"
)


HEAD_REASON = "output head, a linear map (embeddings: auto)"


def is_buffer(name: str) -> bool:
    """Whether a tensor is a constant by its name, which may hold what no weight may."""
    return _BUFFER.search(name) is not None


def is_embedding(name: str, vocabulary_axis: int | None) -> bool:
    """Whether a tensor is an embedding table (token, position, token type) or a head that scores the vocabulary."""
    if vocabulary_axis is not None:
        return True
    owner = name.removesuffix(".weight").removesuffix(".weights")
    path, _, last = owner.rpartition(".")
    if last.isdigit():  # one of a list of tables
        last = path.rpartition(".")[2]
    if _HEAD.search(owner) is not None:
        return True
    words = set(re.split(r"_|\d+", last))
    if last in _MAP_NAMES or words & _MAP_WORDS or (words & _NO_INDEX_WORDS and not words & _POSITION_WORDS):
        return False
    return bool(words & _TABLE_WORDS) or _TABLE_NAMES.fullmatch(last) is not None


def is_output_head(name: str, vocabulary_axis: int | None, heads: Heads) -> bool:
    """Whether a matrix scores the vocabulary, be it that it is the token table too."""
    owner = name.removesuffix(".weight").removesuffix(".weights")
    named = heads != "none" and _HEAD.search(owner) is not None
    return named or (heads == "tied" and vocabulary_axis is not None)


def treatment(
    name: str,
    shape: Sequence[int],
    *,
    vocabulary_axis: int | None = None,
    embeddings: Choice = "average",
    matrices: Choice = "method",
    heads: Heads = "none",
) -> Treatment:
    """Decide how a tensor is merged.

    Args:
        name: its name in the output model; may be empty.
        shape: of the base's tensor, its matrices turned so that inputs come last.
        vocabulary_axis: mergekit's, where it gives one.
        embeddings: the recipe's choice for embedding tables and output heads.
        matrices: the recipe's choice for all other matrices, stacked ones too.
        heads: which tensors `embeddings: auto` takes for output heads.
    """
    if is_buffer(name):
        return Treatment(kind="buffer", reason="a buffer, not a weight")
    if len(shape) >= 2 and is_embedding(name, vocabulary_axis) and embeddings != "method":
        if embeddings == "auto" and len(shape) == 2 and is_output_head(name, vocabulary_axis, heads):
            return Treatment(kind="head", reason=HEAD_REASON)
        reason = f"embedding table or output head (embeddings: {embeddings})"
        return Treatment(kind="base" if embeddings == "base" else "average", reason=reason)
    if _TEXT_PROJECTION.search(name):
        return Treatment(kind="average", reason="CLIP's text projection, averaged as published")
    if 0 in shape:
        return Treatment(kind="base", reason="empty")
    if _STATE_MATRIX.search(name):
        return Treatment(kind="average", reason="state-space decay rates, not a linear map")
    if len(shape) == 2 and _VECTORS.search(name) is not None:
        return Treatment(kind="average", reason="vectors side by side, not a linear map")
    stacked = len(shape) == 3 and _STACKED_EXPERTS.search(name) is not None
    if (stacked or len(shape) == 2) and matrices != "method":
        return Treatment(kind="base" if matrices == "base" else "average", reason=f"matrix (matrices: {matrices})")
    if stacked:
        return Treatment(kind="stack", reason="stacked expert matrices, slice by slice")
    if len(shape) != 2:
        return Treatment(kind="average", reason="vector or scalar" if len(shape) < 2 else "convolution kernel or table")
    if shape[0] == 1:
        # The centered second moment of one row is zero, so there is nothing to weigh the experts by.
        return Treatment(kind="average", reason="a single row")
    return Treatment(kind="matrix", reason="matrix")
