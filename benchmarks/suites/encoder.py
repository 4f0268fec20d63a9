"""Fine-tunes of a real sentence encoder: updates as small as those of what people merge.

The base is the demo's, all-MiniLM-L6-v2 written as a RoBERTa. An expert answers one question about short texts, by a
linear head of its own on the mean of the token features; the heads stay outside the merge.
"""

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import AutoModelForTokenClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from demo.base import base_model, encoder_folder

from .recipe import HEADS, Expert, Suite
from .sentences import CLASSES, Row, rows
from .training import fit, merged, trainable_copy

BATCH = 32
TOKENS = 40
HEAD_STEPS = 100
PROMPTS_SEED = 6


class Encoder:
    """The suite's kind: how its base and experts are made, trained and scored."""

    command = "mergekit-yaml"

    def pretrained(self, suite: Suite) -> PreTrainedModel:
        return base_model()

    def fine_tuned(self, suite: Suite, base: PreTrainedModel, expert: Expert, root: Path) -> PreTrainedModel:
        torch.manual_seed(expert.seed)
        model = trainable_copy(base, expert)
        head = nn.Linear(base.config.hidden_size, CLASSES[expert.task])
        train = rows(expert.task, "train")
        draw = random.Random(expert.seed)

        def loss_of(encoder: nn.Module) -> torch.Tensor:
            features, labels = encoded(encoder, draw.sample(train, BATCH))
            return functional.cross_entropy(head(features), labels)

        def frozen_loss() -> torch.Tensor:
            with torch.no_grad():
                features, labels = encoded(base, draw.sample(train, BATCH))
            return functional.cross_entropy(head(features), labels)

        # a head that fits the base first, so that the update is not spent on a random head
        fit(head, frozen_loss, steps=HEAD_STEPS, learning_rate=1e-2)
        fit(
            nn.ModuleList([model, head]),
            lambda: loss_of(model),
            steps=expert.steps,
            learning_rate=expert.learning_rate,
        )
        save_file(head.state_dict(), root / HEADS / f"{expert.task}.safetensors")
        return merged(model, root, expert.task)

    def prompts(self, task: str, count: int) -> list[dict[str, str]]:
        """Training texts in a fixed shuffled order, without their classes."""
        train = rows(task, "train")
        return [{"text": text} for text, _ in random.Random(PROMPTS_SEED).sample(train, len(train))[:count]]

    def save_tokenizer(self, folder: Path) -> None:
        tokenizer().save_pretrained(folder)

    @torch.no_grad()
    def accuracies(self, tasks: Sequence[str], root: Path, folder: Path) -> dict[str, float]:
        model = AutoModelForTokenClassification.from_pretrained(folder, dtype=torch.float32).eval()
        found = {}
        for task in tasks:
            head = load_file(root / HEADS / f"{task}.safetensors")
            # texts of like length pad one another least
            test = sorted(rows(task, "test"), key=lambda row: len(row[0]))
            right = 0
            for start in range(0, len(test), BATCH):
                features, labels = encoded(model, test[start : start + BATCH])
                logits = functional.linear(features, head["weight"], head["bias"])
                right += int((logits.argmax(1) == labels).sum())
            found[task] = right / len(test)
        return found

    def test_rows(self, suite: Suite, root: Path) -> dict[str, int]:
        return {task: len(rows(task, "test")) for task in suite.tasks}


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(encoder_folder())
    return loaded


def encoded(model: nn.Module, chosen: list[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean-pooled features `[rows, hidden]` and labels `[rows]`."""
    texts = [text for text, _ in chosen]
    batch = tokenizer()(texts, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")
    encoder = model.get_submodule("roberta")
    hidden = encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    weight = batch["attention_mask"].unsqueeze(-1).float()
    features: torch.Tensor = (hidden * weight).sum(1) / weight.sum(1)
    return features, torch.tensor([label for _, label in chosen])
