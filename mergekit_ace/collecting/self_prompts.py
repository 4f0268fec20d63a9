"""Prompts that an expert generates: sampled from it, so that nothing but the models is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from mergekit_ace.collecting.model import ModelError
from mergekit_ace.collecting.prompts import PromptError

LENGTH = 96
"""Tokens that an expert adds to a start. It is not stopped at the end of a turn: where its answer to an empty
turn is empty, it goes on to the next one."""
_BATCH = 16
_ROUNDS = 4
"""An expert is sampled at most so many times as often as samples are wanted."""
_PLACE = "mergekit-ace"
"""Stands for the words of a user, to find where in a template they are."""


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """A text that an expert generated.

    Attributes:
        where: what it continues, for messages.
        ids: tokens of the start and of what the expert added.
    """

    where: str
    ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class _Start:
    where: str
    ids: tuple[int, ...]


class Sampler:
    """Samples prompts from an expert.

    The starts take turns: an empty turn of the user, which the expert answers; the beginning of a turn of the user,
    which the expert writes itself, and then answers (Xu et al., "Magpie", arXiv:2406.08464); the expert's name as a
    turn of the user. Without a chat template: the tokenizer's first token, and the name.

    Args:
        name: of the expert.
        tokenizer: of transformers.
        longest: tokens of a whole text, at most; 0 for no limit.

    Raises:
        PromptError: the tokenizer leaves nothing to start from.
    """

    def __init__(self, name: str, tokenizer: Any, *, longest: int) -> None:
        self._name = name
        self._tokenizer = tokenizer
        self._starts = _starts(name, tokenizer)
        left = longest - max(len(start.ids) for start in self._starts) if longest else LENGTH
        self._length = min(LENGTH, left)
        if self._length < 1:
            raise PromptError(f"{name}: --self-prompts needs a model that takes more than {longest} tokens")

    def sample(
        self,
        model: nn.Module,
        count: int,
        *,
        seed: int,
        device: torch.device,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[Sampled]:
        """Sample different texts, at temperature 1.

        Texts of special tokens and white space alone, and repeats, are not used.

        Args:
            model: the expert.
            count: how many texts are wanted.
            seed: the same one gives the same texts on the same machine.
            device: of the model's first layer.
            progress: told how many texts there are, of how many.

        Returns:
            `count` texts; fewer where four times as many samples do not hold so many different ones.

        Raises:
            ModelError: the model writes no text.
            PromptError: not one text can be used.
        """
        if not getattr(model, "can_generate", lambda: False)():
            raise ModelError(
                f"{self._name}: --self-prompts needs experts that write text; got {type(model).__name__}. Give "
                f"--prompts {self._name}=FILE"
            )
        found: dict[str, Sampled] = {}
        drawn = 0
        # Of every start a whole batch at least, so that a short request has samples of all of them.
        batch = min(_BATCH, -(-count // len(self._starts)))
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            for start, texts in self._rounds(model, batch, device):
                for ids in texts:
                    drawn += 1
                    words = self._tokenizer.decode(ids, skip_special_tokens=True).strip()
                    if words and words not in found and len(found) < count:
                        found[words] = Sampled(where=start.where, ids=(*start.ids, *ids))
                progress(len(found), count)
                if len(found) == count or drawn >= _ROUNDS * count:
                    break
        if not found:
            raise PromptError(
                f"{self._name}: none of the expert's {drawn} samples could be used as a prompt. Give "
                f"--prompts {self._name}=FILE"
            )
        return list(found.values())

    def _rounds(
        self, model: nn.Module, batch: int, device: torch.device
    ) -> Iterator[tuple[_Start, Sequence[Sequence[int]]]]:
        while True:
            for start in self._starts:
                yield start, _continued(model, start, batch, self._length, device)


@torch.no_grad()
def _continued(model: Any, start: _Start, count: int, length: int, device: torch.device) -> Sequence[Sequence[int]]:
    """What a model adds to a start, `count` times, `length` tokens each."""
    inputs = torch.tensor([start.ids] * count, device=device)
    # `generate` takes what is None from the model's own settings.
    model.generation_config.eos_token_id = None
    plain = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=length,
        use_cache=True,
    )
    texts = model.generate(inputs, attention_mask=torch.ones_like(inputs), generation_config=plain)
    added: list[list[int]] = texts[:, len(start.ids) :].tolist()
    return added


def _starts(name: str, tokenizer: Any) -> list[_Start]:
    words = " ".join(name.replace("-", " ").replace("_", " ").split())
    if tokenizer.chat_template is None:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        found = [_Start(where="an empty text", ids=() if first is None else (int(first),))]
        found.append(_Start(where="the expert's name", ids=tuple(tokenizer(words).input_ids)))
    else:
        found = [
            _Start(where="an empty turn of the user", ids=_templated(name, "", tokenizer)),
            _Start(where="the beginning of a turn of the user", ids=_beginning(name, tokenizer)),
            _Start(where="the expert's name", ids=_templated(name, words, tokenizer)),
        ]
    found = [start for start in found if start.ids]
    if not found:
        raise PromptError(f"{name}: the tokenizer gives no token to start a text with. Give --prompts {name}=FILE")
    return found


def _templated(name: str, words: str, tokenizer: Any) -> tuple[int, ...]:
    try:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": words}], add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except Exception as error:  # whatever the template, a program of the model's authors, raises
        raise PromptError(f"{name}: the model's chat template does not accept a turn of the user; {error}") from error
    return tuple(ids)


def _beginning(name: str, tokenizer: Any) -> tuple[int, ...]:
    """Tokens of a conversation up to where the user's words begin."""
    text = tokenizer.apply_chat_template([{"role": "user", "content": _PLACE}], tokenize=False)
    before, found, _ = text.partition(_PLACE)
    return tuple(tokenizer(before, add_special_tokens=False).input_ids) if found else ()
