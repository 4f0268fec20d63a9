"""From prompts to token ids, and which of the tokens are sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mergekit_ace.collecting.prompts import Prompt, PromptError


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A prompt's tokens, the positions whose layer inputs are sampled, and where the prompt was read."""

    where: str
    ids: tuple[int, ...]
    positions: tuple[int, ...]


def encode(prompt: Prompt, tokenizer: Any, *, longest: int) -> list[int]:
    """Token ids of one prompt: by the tokenizer's chat template where both have one, else as plain text.

    A conversation that does not end with the assistant ends with what its answer starts with. Without a template the
    turns stand one below the other.

    Args:
        prompt: what to encode.
        tokenizer: of transformers.
        longest: tokens beyond are cut off; 0 for no limit.

    Raises:
        PromptError: the template does not accept the prompt, or it has no token.
    """
    if prompt.turns and tokenizer.chat_template is not None:
        messages = [{"role": turn.role, "content": turn.content} for turn in prompt.turns]
        try:
            ids = tokenizer.apply_chat_template(
                messages, add_generation_prompt=prompt.turns[-1].role != "assistant", tokenize=True, return_dict=False
            )
        except Exception as error:  # whatever the template, a program of the model's authors, raises
            raise PromptError(f"{prompt.where}: the model's chat template does not accept it; {error}") from error
    else:
        text = prompt.text or "\n".join(turn.content for turn in prompt.turns)
        ids = tokenizer(text).input_ids
    if not ids:
        raise PromptError(f"{prompt.where}: the prompt must have at least one token; it has none")
    return list(ids[:longest] if longest else ids)


def sample(prompts: Sequence[Prompt], encoded: Sequence[Sequence[int]], *, tokens: int, seed: int) -> list[Encoded]:
    """Choose the positions to be sampled, spread over the prompts: of each as many, but for prompts that have fewer.

    Args:
        prompts: what was encoded.
        encoded: ids of each prompt.
        tokens: at most so many positions in all.
        seed: of the choice within a prompt.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen: list[Encoded] = []
    shares = _shares([len(ids) for ids in encoded], tokens)
    for prompt, ids, share in zip(prompts, encoded, shares, strict=True):
        positions = sorted(torch.randperm(len(ids), generator=generator)[:share].tolist())
        chosen.append(Encoded(where=prompt.where, ids=tuple(ids), positions=tuple(positions)))
    return chosen


def _shares(lengths: Sequence[int], total: int) -> list[int]:
    """Parts of `total`, none above its length, as equal as that allows."""
    shares = [0] * len(lengths)
    shortest_first = sorted(range(len(lengths)), key=lambda index: lengths[index])
    for done, index in enumerate(shortest_first):
        shares[index] = min(lengths[index], total // (len(lengths) - done))
        total -= shares[index]
    return shares
