"""Word-level tokenizers over a vocabulary of invented words."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def save_tokenizer(folder: Path, words: int, *, added: Sequence[str] = ()) -> list[str]:
    """Write a tokenizer of `words` words and, after them, the added tokens; returns the tokens in order."""
    tokens = ["<unk>", "<s>", "</s>", *(f"word{index}" for index in range(words - 3))]
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    fast.add_tokens(list(added))
    fast.save_pretrained(folder)
    return [*tokens, *added]
