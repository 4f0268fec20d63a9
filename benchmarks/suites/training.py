"""Fitting a model to batches: the optimizer loop, LoRA and frozen layers."""

import copy
import math
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from .recipe import ADAPTERS, Expert

WARMUP_FRACTION = 0.1
WEIGHT_DECAY = 0.01
GRADIENT_NORM = 1.0


def fit(model: nn.Module, loss: Callable[[], torch.Tensor], *, steps: int, learning_rate: float) -> float:
    """Minimize `loss()` over the model's trainable parameters with AdamW: linear warm-up, cosine decay to zero.

    Returns the mean loss of the last tenth of the steps.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=WEIGHT_DECAY)
    warmup = max(1, round(WARMUP_FRACTION * steps))

    def schedule(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    model.train()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, GRADIENT_NORM)
        optimizer.step()
        scheduler.step()
        losses.append(value.item())
    model.eval()
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / max(1, len(tail))


def trainable_copy(base: PreTrainedModel, expert: Expert) -> PreTrainedModel | PeftModel:
    """A copy of the base in which only what the expert's recipe trains requires a gradient."""
    model = copy.deepcopy(base)
    if expert.lora_rank:
        adapter = LoraConfig(
            r=expert.lora_rank,
            lora_alpha=16 if expert.rank_stabilized else 2 * expert.lora_rank,
            use_rslora=expert.rank_stabilized,
            target_modules="all-linear",
            # a head that is the embedding table stays as it is; peft finds it by this
            task_type="CAUSAL_LM" if isinstance(base, GenerationMixin) and base.config.tie_word_embeddings else None,
        )
        model = get_peft_model(model, adapter)
    for name, parameter in model.named_parameters():
        if any(part in name for part in expert.frozen):
            parameter.requires_grad_(False)
    return model


def merged(model: PreTrainedModel | PeftModel, root: Path, task: str) -> PreTrainedModel:
    """The full model: a LoRA's product is added to the weights it adapts, and the LoRA itself kept in `root`."""
    if not isinstance(model, PeftModel):
        return model
    model.save_pretrained(root / ADAPTERS / task, save_embedding_layers=False)
    return model.merge_and_unload()
