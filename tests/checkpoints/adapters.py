"""LoRA adapters with random factors, written by peft."""

from collections.abc import Sequence
from pathlib import Path

import peft
import torch
from transformers import AutoModelForCausalLM


def add_adapter(
    base: Path, folder: Path, *, rank: int, targets: Sequence[str], seed: int = 0, scale: float = 0.05
) -> Path:
    """Write an adapter of the base to `folder`; both factors are drawn, so that its update is not zero."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets), task_type="CAUSAL_LM")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * scale)
    model.save_pretrained(folder)
    return folder
