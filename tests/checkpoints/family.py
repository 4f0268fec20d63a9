"""What a test needs to know of an architecture family."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

VOCABULARY = 96
# Sizes that most decoders and encoders share: small, and no two of them equal where a mix-up should show.
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
HEADS_OF_THEIR_OWN_SIZE = {**GROUPED, "head_dim": 8}


@dataclass(frozen=True)
class Family:
    """How to build a model, which tensors are not matrices of a linear layer, and how to call it.

    `tables`, `averaged` and `input_first` are name patterns as in `tests.reference.Recipe`.
    """

    name: str
    build: Callable[[], PreTrainedModel]
    inputs: Callable[[], dict[str, Tensor]]
    tables: tuple[str, ...] = ()
    averaged: tuple[str, ...] = ()
    input_first: tuple[str, ...] = ()


def tokens() -> dict[str, Tensor]:
    """A sentence of seven tokens."""
    return {"input_ids": torch.tensor([[1, 5, 9, 33, 60, 7, 2]])}


def causal(name: str, config: transformers.PretrainedConfig, **patterns: tuple[str, ...]) -> Family:
    """A decoder with a language-modelling head."""

    def build() -> PreTrainedModel:
        # A model that is saved writes its dtype into its configuration, in which the next one would be made.
        return transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config))

    return Family(name, build, tokens, **patterns)
