"""Which tensors of a model are its output head: what `embeddings: auto` merges as a linear map."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache

from mergekit.common import ModelReference

from mergekit_ace.tensor_treatment import Heads

# Of classes of transformers whose output is a score for each token of the vocabulary.
_SCORES_THE_VOCABULARY = ("ForCausalLM", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining", "LMHeadModel")


def heads_of(models: Sequence[Hashable]) -> Heads:
    """How to tell the output heads of a merge.

    Adapters change tables by factors, if at all, and are averaged there, in models and in adapters alike.

    Args:
        models: the base first; mergekit's references where they come from a recipe. Without a base's configuration a
            table counts as an input table alone.
    """
    references = [model for model in models if isinstance(model, ModelReference)]
    if any(reference.lora is not None for reference in references):
        return "none"
    return "tied" if references and references[0] == models[0] and _is_tied(references[0]) else "named"


@lru_cache(maxsize=64)
def _is_tied(base: ModelReference) -> bool:
    try:
        config = base.config()
    except Exception:  # no configuration, or one that transformers does not know: mergekit's planning reports it
        return False
    scores = any(name.endswith(_SCORES_THE_VOCABULARY) for name in config.architectures or ())
    return scores and bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
