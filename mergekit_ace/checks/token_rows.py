"""Rows of embedding tables that a tokenizer source takes from models that do not have them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from mergekit.common import ModelReference
from mergekit.tokenizer.config import ModelTokenEmbedding, TokenEmbeddingConfig

from mergekit_ace.checks.vocabularies import vocabulary
from mergekit_ace.recipe.findings import Finding
from mergekit_ace.recipe.plan import Plan

_MOST_NAMES = 3


def check_token_rows(plan: Plan) -> Iterator[Finding]:
    """Tables shorter than their tokenizer, and entries under `tokens:` whose model lacks the token.

    mergekit stops at the first embedding table in these cases, and names no model or no tensor.
    """
    config = plan.recipe.config
    source = config.tokenizer.source if config.tokenizer is not None else config.tokenizer_source
    if source is None and config.tokenizer is None:
        return
    known = {model: vocabulary(model.lora or model.model) or vocabulary(model.model) for model in plan.models}
    named = plan.models if source == "union" else [source if isinstance(source, ModelReference) else plan.models[0]]
    wanted = {token for model in named for token in (known.get(model) or vocabulary(model.model) or {})}
    for model, tokens in known.items():
        if tokens is not None:
            yield from _short(plan, model, {token: row for token, row in tokens.items() if token in wanted})
    if config.tokenizer is not None:
        for token, entry in (config.tokenizer.tokens or {}).items():
            lacking = [model for model, tokens in known.items() if tokens is not None and token not in tokens]
            if entry.force or lacking:  # or mergekit asks for no row
                yield from _source(plan, token, entry, known)


def _short(plan: Plan, model: ModelReference, tokens: Mapping[str, int]) -> Iterator[Finding]:
    name, rows = _table(plan, model)
    beyond = [token for token, row in tokens.items() if rows is not None and row >= rows]
    if beyond:
        yield Finding(
            level="error",
            what=f"{model} has {rows} rows in {name}, and its tokenizer has {_some(beyond)} beyond them",
            remedy="Give the table as many rows as the tokenizer has tokens, by resize_token_embeddings, or copy the "
            "tokenizer into it that belongs to its weights.",
        )


def _source(
    plan: Plan, token: str, entry: TokenEmbeddingConfig, known: Mapping[ModelReference, Mapping[str, int] | None]
) -> Iterator[Finding]:
    source, where = entry.source, f"tokenizer.tokens: {token}"
    if isinstance(source, ModelTokenEmbedding):
        model, wanted, row = source.model, source.token, source.token_id
    elif isinstance(source, ModelReference):
        model, wanted, row = source, token, None
    else:
        return
    tokens, (name, rows) = known.get(model), _table(plan, model)
    if row is not None and rows is not None and not 0 <= row < rows:
        yield Finding(
            level="error",
            what=f"{where} takes row {row} of {model}, which has {rows} rows in {name}",
            remedy="Name a row that is there.",
        )
    elif row is None and tokens is not None and wanted not in tokens:
        having = [str(model) for model, held in known.items() if held is not None and wanted in held]
        yield Finding(
            level="error",
            what=f"{where} takes its row from {model}, whose tokenizer has no token {wanted!r}",
            remedy=f"Take it from {having[0]}, which has it."
            if having
            else "Write source: {kind: zero}, or "
            "source: {kind: model_token, model: MODEL, token: TOKEN} with a token that the model has.",
        )


def _table(plan: Plan, model: ModelReference) -> tuple[str, int | None]:
    """The first table of a model that has a vocabulary axis, and its rows."""
    for tensor in plan.tensors:
        if tensor.vocabulary_axis is not None and tensor.reads(model):
            header = tensor.header(model)
            if header is not None:
                return tensor.name, header.shape[tensor.vocabulary_axis]
    return "", None


def _some(tokens: Sequence[str]) -> str:
    listed = ", ".join(map(repr, tokens[:_MOST_NAMES]))
    return listed if len(tokens) <= _MOST_NAMES else f"{listed} and {len(tokens) - _MOST_NAMES} more"
