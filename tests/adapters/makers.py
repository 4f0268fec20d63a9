"""Small base models, and adapters of them as peft writes them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

from mergekit_ace.factors.model import Adapter, Place
from mergekit_ace.linalg.factors import Factors

SMALL = {
    "vocab_size": 48,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, **changes)).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 32}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).eval()


def classifier() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    config = transformers.RobertaConfig(**sizes, num_attention_heads=4, max_position_embeddings=32, num_labels=3)
    return transformers.RobertaForSequenceClassification(config).eval()


def mixture() -> nn.Module:
    torch.manual_seed(0)
    sizes = {**SMALL, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 6}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes)).eval()


def adapted(base: nn.Module, config: Any, *, seed: int, scale: float = 0.1) -> Any:
    """A `PeftModel` of a copy of the base whose every trainable tensor was drawn anew."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * scale)
    return model.eval()


def saved(model: Any, folder: Path, **flags: Any) -> Path:
    model.save_pretrained(folder, **flags)
    return folder


def merged_weights(model: Any) -> dict[str, Tensor]:
    """What peft itself makes of an adapter: the weights with the update added."""
    return {name: tensor.clone() for name, tensor in copy.deepcopy(model).merge_and_unload().state_dict().items()}


def dense(place: Place, factors: Factors) -> Tensor:
    """The update as the base stores the weight."""
    update = factors.left @ factors.right
    if place.kind == "stack":
        return update
    return (update.mT if place.transposed else update).reshape(place.stored_shape)


def updates_of(adapter: Adapter) -> dict[str, Tensor]:
    return {name: dense(update.place, update.read()) for name, update in adapter.updates.items()}
