"""One small model of each architecture family, and what a merge must know about its tensors."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

VOCABULARY = 96
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


def _causal(name: str, config: transformers.PretrainedConfig, **patterns: tuple[str, ...]) -> Family:
    return Family(name, lambda: transformers.AutoModelForCausalLM.from_config(config), tokens, **patterns)


DECODER_TABLES = ("model.embed_tokens.weight", "lm_head.weight")

FAMILIES = {
    family.name: family
    for family in (
        _causal(
            "llama",
            transformers.LlamaConfig(**GROUPED, tie_word_embeddings=False),
            tables=DECODER_TABLES,
        ),
        _causal(
            "llama-tied",
            transformers.LlamaConfig(**SMALL, tie_word_embeddings=True),
            tables=DECODER_TABLES,
        ),
        _causal(
            "gpt2",
            transformers.GPT2Config(
                vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
            ),
            tables=("transformer.w?e.weight", "w?e.weight", "lm_head.weight"),
            input_first=("*.c_attn.weight", "*.c_proj.weight", "*.c_fc.weight"),
        ),
        Family(
            "roberta",
            lambda: transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**SMALL, num_labels=3)),
            tokens,
            tables=("*.word_embeddings.weight", "*.position_embeddings.weight", "*.token_type_embeddings.weight"),
        ),
        _causal(
            "mixtral",
            transformers.MixtralConfig(**GROUPED, num_local_experts=4),
            tables=DECODER_TABLES,
        ),
        _causal(
            "qwen3-moe",
            transformers.Qwen3MoeConfig(**GROUPED, head_dim=8, num_experts=4, moe_intermediate_size=24),
            tables=DECODER_TABLES,
        ),
    )
}
