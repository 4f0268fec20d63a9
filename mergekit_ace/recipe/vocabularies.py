"""The vocabularies of a recipe's models: tokens that are numbered otherwise than the base's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mergekit.common import ModelPath

from mergekit_ace.mergekit_internals import in_recipe_order
from mergekit_ace.recipe.findings import Finding
from mergekit_ace.recipe.reading import Recipe
from mergekit_ace.recipe.sources import read_json


def check_tokenizers(recipe: Recipe) -> Iterator[Finding]:
    """Experts whose tokens are numbered otherwise than the base's, in a recipe that aligns no vocabularies."""
    if recipe.config.tokenizer is not None or recipe.config.tokenizer_source is not None:
        return
    models = in_recipe_order(recipe.config)
    base = _vocabulary(models[0].model)
    for expert in models[1:]:
        tokens = _vocabulary(expert.lora or expert.model)
        if base is None or tokens is None or tokens == base:
            continue
        moved = sum(base[token] != number for token, number in tokens.items() if token in base)
        yield Finding(
            level="warning",
            what=f"{expert} has another tokenizer than the base: {len(tokens.keys() - base.keys())} tokens more, "
            f"{len(base.keys() - tokens.keys())} fewer, {moved} with another number; rows of different tokens would be "
            "merged",
            remedy="Align them: tokenizer: {source: base}, or {source: union} to keep every token.",
        )


def _vocabulary(source: ModelPath) -> Mapping[str, int] | None:
    document = read_json(source, "tokenizer.json")
    if document is None:
        return None
    listed = document.get("model", {}).get("vocab", {})
    # WordPiece and BPE map tokens to numbers; Unigram lists pairs of token and score.
    tokens = dict(listed) if isinstance(listed, Mapping) else {pair[0]: index for index, pair in enumerate(listed)}
    return tokens | {token["content"]: token["id"] for token in document.get("added_tokens", [])}
