"""The merged model's tokenizer, with the same numbers in every process.

mergekit numbers the tokens that a union adds in the order in which `get_vocab()` lists them, and that order is another
one in every process. Here tokens are added in the order of their numbers in the tokenizer that they come from, models
in the order of the recipe.
"""

from __future__ import annotations

import tempfile
from typing import Any

import transformers
from mergekit.common import ModelPath, ModelReference

from mergekit_ace.mergekit_internals import (
    BuildTokenizer,
    TokenizerInfo,
    build_tokenizer,
    build_union_tokenizer,
    get_stripped_tokenizer,
)
from mergekit_ace.recipe.failures import RecipeError, message_of


def numbered_tokenizer(task: BuildTokenizer) -> TokenizerInfo:
    """The tokenizer that mergekit makes for a recipe, and the number of each of its tokens in every model.

    Raises:
        RecipeError: with the source of the tokenizer, which cannot be read.
    """
    try:
        return _numbered(task)
    except Exception as error:  # transformers, tokenizers and the hub each raise their own
        raise RecipeError(f"the tokenizer of {task.tokenizer_source} cannot be made; {message_of(error)}") from error


def _numbered(task: BuildTokenizer) -> TokenizerInfo:
    if task.tokenizer_source != "union":
        tokenizer: TokenizerInfo = task.execute()
        return tokenizer
    base = task.base_model or task.referenced_models[0]
    with tempfile.TemporaryDirectory() as folder:
        _union(task, base).save_pretrained(folder)
        return build_tokenizer(
            base_model=base,
            referenced_models=list(task.referenced_models),
            tokenizer_source=ModelReference(model=ModelPath(path=folder)),
            trust_remote_code=task.trust_remote_code,
            add_tokens=list(task.add_tokens or ()),
        )


def _union(task: BuildTokenizer, base: ModelReference) -> transformers.PreTrainedTokenizerBase:
    ordered: dict[ModelReference, Any] = {
        base: _Ordered(get_stripped_tokenizer(base.model, trust_remote_code=task.trust_remote_code))
    }
    for model in task.referenced_models:
        if model in ordered:
            continue
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                model.model.path, revision=model.model.revision, trust_remote_code=task.trust_remote_code
            )
        except Exception:  # as in mergekit, which takes the base's in its place, and logs that when it numbers them
            continue
        ordered[model] = _Ordered(tokenizer)
    return build_union_tokenizer(ordered[base], ordered, trust_remote_code=task.trust_remote_code)


class _Ordered:
    """A tokenizer whose vocabulary is listed by number."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def get_vocab(self) -> dict[str, int]:
        vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        return dict(sorted(vocabulary.items(), key=lambda item: item[1]))

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        return dict(sorted(self._tokenizer.added_tokens_decoder.items()))
