"""The tokenizers of a recipe's models: tokens numbered otherwise, other ends, chat templates, padded tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from mergekit.common import ModelPath

from mergekit_ace.checkpoints.sources import read_json
from mergekit_ace.mergekit_internals import in_recipe_order
from mergekit_ace.recipe.findings import Finding
from mergekit_ace.recipe.plan import Plan
from mergekit_ace.recipe.reading import Recipe

# Files that hold tokens, one of which every tokenizer of transformers has.
_TOKENIZERS = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model"),
    *("tokenizer_config.json", "source.spm", "tiktoken.model", "tekken.json"),
)


def check_tokenizers(recipe: Recipe) -> Iterator[Finding]:
    """Experts whose tokens are numbered otherwise than the base's, in a recipe that aligns no vocabularies."""
    if recipe.config.tokenizer is not None or recipe.config.tokenizer_source is not None:
        return
    models = in_recipe_order(recipe.config)
    base = vocabulary(models[0].model)
    for expert in models[1:]:
        tokens = vocabulary(expert.lora or expert.model)
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


def check_missing_tokenizers(recipe: Recipe) -> Iterator[Finding]:
    """Folders without a tokenizer, where the merged model's is made or copied from them."""
    base, *experts = in_recipe_order(recipe.config)
    without = [model for model in (base, *experts) if _has_tokenizer(model.model) is False]
    if recipe.config.tokenizer is None and recipe.config.tokenizer_source is None:
        if base in without and recipe.config.chat_template:
            yield Finding(
                level="error",
                what=f"{base} has no tokenizer, with which chat_template is saved",
                remedy="Copy one into the base's folder, add tokenizer_source: EXPERT, or remove chat_template.",
            )
        elif base in without and any(_has_tokenizer(expert.lora or expert.model) for expert in experts):
            yield Finding(
                level="warning",
                what=f"{base} has no tokenizer, so the merged model will have none",
                remedy="Copy one into the base's folder, or add tokenizer_source: EXPERT.",
            )
        return
    for model in dict.fromkeys(without):
        if model == base:
            yield Finding(
                level="error",
                what=f"{base} must have a tokenizer, for the tokens of all models are numbered by it; it has none",
                remedy="Copy the tokenizer's files into it, from where the model was trained.",
            )
        else:
            yield Finding(
                level="warning",
                what=f"{model} has no tokenizer: mergekit takes its tokens to be numbered as the base's",
                remedy="Copy the tokenizer's files into it, unless it has the base's tokens.",
            )


def check_chat_template(recipe: Recipe) -> Iterator[Finding]:
    """A base without a chat template under experts that have one: the merged model's tokenizer is the base's."""
    models = in_recipe_order(recipe.config)
    if recipe.config.chat_template or _has_chat_template(models[0].model) is not False:
        return
    chats = [expert for expert in models[1:] if _has_chat_template(expert.lora or expert.model)]
    if chats:
        yield Finding(
            level="warning",
            what=f"{', '.join(map(str, chats[:3]))} have a chat template and the base has none: the merged "
            "model has the base's tokenizer, and nothing that formats a chat",
            remedy="Add chat_template: auto to the recipe.",
        )


def check_ends(recipe: Recipe) -> Iterator[Finding]:
    """Experts that end their answers with other tokens than the base: the merged model keeps the base's."""
    models = in_recipe_order(recipe.config)
    base = _ends(models[0].model)
    for source in dict.fromkeys(expert.model for expert in models[1:]):
        theirs = _ends(source)
        if base and theirs and not theirs <= base:
            yield Finding(
                level="warning",
                what=f"{source} ends with eos_token_id {_numbers(theirs)} where the base ends with {_numbers(base)}: "
                "the merged model keeps the base's and may not know when to stop",
                remedy="After the merge set eos_token_id in its generation_config.json to the tokens of both.",
            )


def check_padding(plan: Plan) -> Iterator[Finding]:
    """Embedding tables with more rows than tokens, which a tokenizer source cuts to the tokens."""
    config = plan.recipe.config
    source = config.tokenizer.source if config.tokenizer is not None else config.tokenizer_source
    if plan.base is None or source not in ("base", "union"):
        return
    named = [plan.base] if source == "base" else plan.models
    vocabularies = [vocabulary(model.lora or model.model) or vocabulary(model.model) for model in named]
    if any(known is None for known in vocabularies):
        return
    tokens = len({token for known in vocabularies for token in known or ()})
    multiple = (config.tokenizer.pad_to_multiple_of if config.tokenizer is not None else None) or 1
    rows = -(-tokens // multiple) * multiple
    for tensor in plan.tensors:
        if tensor.vocabulary_axis is None or tensor.base is None or not tensor.reads(tensor.base):
            continue
        header = tensor.header(tensor.base)
        if header is not None and header.shape[tensor.vocabulary_axis] > rows:
            held = header.shape[tensor.vocabulary_axis]
            yield Finding(
                level="warning",
                what=f"{tensor.name} has {held} rows in the base for {tokens} tokens: the tokenizer source {source} "
                f"cuts it to {rows}",
                remedy="Nothing to do, if nothing needs the base's size. tokenizer: {pad_to_multiple_of: "
                f"{_multiple(tokens, held)}}} keeps it; without tokenizer and tokenizer_source tables are not touched.",
            )
            return  # the head has the same rows


def _has_tokenizer(source: ModelPath) -> bool | None:
    """None where the model is not on this disk."""
    folder = Path(source.path)
    return any((folder / name).is_file() for name in _TOKENIZERS) if folder.is_dir() else None


def _has_chat_template(source: ModelPath) -> bool | None:
    """None where the model has no tokenizer on this disk."""
    settings = read_json(source, "tokenizer_config.json")
    if settings is None:
        return None
    files = ("chat_template.jinja", "chat_template.json")
    return bool(settings.get("chat_template")) or any(Path(source.path, name).is_file() for name in files)


def _ends(source: ModelPath) -> frozenset[int]:
    for name in ("generation_config.json", "config.json"):
        ends = (read_json(source, name) or {}).get("eos_token_id")
        if ends is not None:
            return frozenset(ends if isinstance(ends, list) else [ends])
    return frozenset()


def _numbers(ends: frozenset[int]) -> str:
    return ", ".join(map(str, sorted(ends)))


def _multiple(tokens: int, rows: int) -> int:
    """The largest power of two that rounds the number of tokens up to the rows; the rows where none does."""
    powers = [1 << power for power in range(20)]
    return next((power for power in reversed(powers) if -(-tokens // power) * power == rows), rows)


def vocabulary(source: ModelPath) -> Mapping[str, int] | None:
    """A model's tokens by their numbers, added ones too; None where it has no tokenizer.json."""
    document = read_json(source, "tokenizer.json")
    if document is None:
        return None
    listed = document.get("model", {}).get("vocab", {})
    # WordPiece and BPE map tokens to numbers; Unigram lists pairs of token and score.
    tokens = dict(listed) if isinstance(listed, Mapping) else {pair[0]: index for index, pair in enumerate(listed)}
    return tokens | {token["content"]: token["id"] for token in document.get("added_tokens", [])}
