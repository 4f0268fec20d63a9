"""A small vision transformer on scikit-learn's handwritten digits, and eight tasks made of them.

The base reads one digit anywhere on a 16 x 16 canvas, and each of the four digits on a canvas of quadrants. An expert
is fine-tuned to a transformed canvas, or to another question about it, with a linear head of its own on the class
token; the heads stay outside the merge. Training and test canvases are drawn from disjoint sets of written digits.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel, ViTConfig, ViTModel

from .recipe import HEADS, Expert, Suite
from .training import fit, merged, trainable_copy

BATCH = 64
PRETRAINING_STEPS = 2400
PRETRAINING_RATE = 1e-3
HEAD_STEPS = 100
TEST_ROWS = 1200
TRAINING_DIGITS = 1100
CANVAS = 16
BLOCK = 4
SHUFFLE = (9, 4, 14, 2, 7, 12, 0, 10, 5, 15, 1, 11, 6, 3, 13, 8)


@cache
def written_digits(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images `[N, 8, 8]` in [0, 1] and their labels `[N]`."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    rows = order[:TRAINING_DIGITS] if split == "train" else order[TRAINING_DIGITS:]
    return torch.tensor(digits.images, dtype=torch.float32)[rows] / 16, torch.tensor(digits.target)[rows]


class Canvases:
    """Draws canvases `[rows, 1, 16, 16]` in [-1, 1] with their labels `[rows]` for one task, endlessly."""

    def __init__(self, split: str, seed: int) -> None:
        self.images, self.labels = written_digits(split)
        self.random = torch.Generator().manual_seed(seed)

    def draw(self, task: str, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        canvas, label = getattr(self, task)(rows)
        canvas = canvas + 0.1 * torch.randn(canvas.shape, generator=self.random)
        return (2 * canvas - 1).unsqueeze(1), label

    def one(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A digit of 12 x 12 pixels somewhere on the canvas."""
        pick = torch.randint(len(self.labels), (rows,), generator=self.random)
        large = functional.interpolate(self.images[pick].unsqueeze(1), size=12, mode="bilinear").squeeze(1)
        canvas = torch.zeros(rows, CANVAS, CANVAS)
        places = torch.randint(CANVAS - 12 + 1, (rows, 2), generator=self.random).tolist()
        for row, (top, left) in enumerate(places):
            canvas[row, top : top + 12, left : left + 12] = large[row]
        return canvas, self.labels[pick]

    def four(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Four digits in the quadrants, labels `[rows, 4]` in reading order."""
        pick = torch.randint(len(self.labels), (rows, 4), generator=self.random)
        quadrants = self.images[pick].view(rows, 2, 2, 8, 8)
        return quadrants.permute(0, 1, 3, 2, 4).reshape(rows, CANVAS, CANVAS), self.labels[pick]

    def rotated(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        canvas, label = self.one(rows)
        return canvas.rot90(1, (1, 2)), label

    def mirrored(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        canvas, label = self.one(rows)
        return canvas.flip(2), label

    def inverted(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        canvas, label = self.one(rows)
        return 1 - canvas, label

    def shuffled(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The 4 x 4 blocks of the canvas in a fixed foreign order."""
        canvas, label = self.one(rows)
        side = CANVAS // BLOCK
        blocks = canvas.view(rows, side, BLOCK, side, BLOCK).permute(0, 1, 3, 2, 4).reshape(rows, side**2, BLOCK, BLOCK)
        moved = blocks[:, list(SHUFFLE)].view(rows, side, side, BLOCK, BLOCK)
        return moved.permute(0, 1, 3, 2, 4).reshape(rows, CANVAS, CANVAS), label

    def occluded(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A bright bar of two columns hides part of a noisy digit."""
        canvas, label = self.one(rows)
        canvas = canvas + 0.3 * torch.randn(canvas.shape, generator=self.random)
        bars = torch.randint(3, CANVAS - 5, (rows,), generator=self.random).tolist()
        for row, left in enumerate(bars):
            canvas[row, :, left : left + 2] = 1
        return canvas, label

    def evens(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """How many of the four digits are even, 0 to 4."""
        canvas, labels = self.four(rows)
        return canvas, (labels % 2 == 0).sum(1)

    def above_four(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Which of the 16 patterns of "greater than 4" the four digits make."""
        canvas, labels = self.four(rows)
        return canvas, (labels > 4).long() @ torch.tensor([8, 4, 2, 1])

    def diagonal(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of the digits at the top left and the bottom right, modulo 5."""
        canvas, labels = self.four(rows)
        return canvas, (labels[:, 0] + labels[:, 3]) % 5


CLASSES = {
    "rotated": 10,
    "mirrored": 10,
    "inverted": 10,
    "shuffled": 10,
    "occluded": 10,
    "evens": 5,
    "above_four": 16,
    "diagonal": 5,
}


QUARTETS = ("evens", "above_four", "diagonal")


class Digits:
    """The suite's kind: how its base and experts are trained, stored and scored."""

    # mergekit-yaml 0.1.5 infers ViT's layers under other names than the checkpoint's and leaves them out
    command = "mergekit-pytorch"

    def pretrained(self, suite: Suite) -> PreTrainedModel:
        torch.manual_seed(suite.seed)
        config = ViTConfig(
            hidden_size=96,
            num_hidden_layers=5,
            num_attention_heads=4,
            intermediate_size=256,
            image_size=CANVAS,
            patch_size=BLOCK,
            num_channels=1,
        )
        model = ViTModel(config, add_pooling_layer=False)
        heads = nn.Linear(config.hidden_size, 50)
        canvases = Canvases("train", suite.seed)

        def loss() -> torch.Tensor:
            single, digit = canvases.draw("one", BATCH // 2)
            quartet, digits = canvases.draw("four", BATCH // 2)
            logits = heads(class_token(model, torch.cat([single, quartet]))).view(-1, 5, 10)
            of_single = functional.cross_entropy(logits[: len(digit), 0], digit)
            of_quartet = functional.cross_entropy(logits[len(digit) :, 1:].reshape(-1, 10), digits.reshape(-1))
            return of_single + of_quartet

        fit(nn.ModuleList([model, heads]), loss, steps=PRETRAINING_STEPS, learning_rate=PRETRAINING_RATE)
        return model

    def fine_tuned(self, suite: Suite, base: PreTrainedModel, expert: Expert, root: Path) -> PreTrainedModel:
        torch.manual_seed(expert.seed)
        model = trainable_copy(base, expert)
        head = nn.Linear(base.config.hidden_size, CLASSES[expert.task])
        canvases = Canvases("train", expert.seed)

        def loss() -> torch.Tensor:
            canvas, label = canvases.draw(expert.task, BATCH)
            return functional.cross_entropy(head(class_token(model, canvas)), label)

        # a head that fits the base first, so that the update is not spent on a random head
        fit_head(head, base, canvases, expert.task)
        fit(nn.ModuleList([model, head]), loss, steps=expert.steps, learning_rate=expert.learning_rate)
        save_file(head.state_dict(), root / HEADS / f"{expert.task}.safetensors")
        return merged(model, root, expert.task)

    @torch.no_grad()
    def accuracies(self, tasks: Sequence[str], root: Path, folder: Path) -> dict[str, float]:
        model = ViTModel.from_pretrained(folder, add_pooling_layer=False, dtype=torch.float32).eval()
        found = {}
        for task in tasks:
            head = load_file(root / HEADS / f"{task}.safetensors")
            canvas, label = Canvases("test", 0).draw(task, TEST_ROWS)
            logits = functional.linear(class_token(model, canvas), head["weight"], head["bias"])
            found[task] = (logits.argmax(1) == label).float().mean().item()
        return found

    def test_rows(self, suite: Suite, root: Path) -> dict[str, int]:
        """The written digits behind the canvases, where there are fewer of them than canvases."""
        written = len(written_digits("test")[1])
        return {task: min(TEST_ROWS, written * (4 if task in QUARTETS else 1)) for task in suite.tasks}


def class_token(model: nn.Module, canvas: torch.Tensor) -> torch.Tensor:
    """Features `[rows, hidden]` of the class token."""
    features: torch.Tensor = model(pixel_values=canvas).last_hidden_state[:, 0]
    return features


def fit_head(head: nn.Linear, base: PreTrainedModel, canvases: Canvases, task: str) -> None:
    """Fit a linear head to the base's features, the backbone untouched."""

    def loss() -> torch.Tensor:
        canvas, label = canvases.draw(task, BATCH)
        with torch.no_grad():
            features = class_token(base, canvas)
        return functional.cross_entropy(head(features), label)

    fit(head, loss, steps=HEAD_STEPS, learning_rate=1e-2)
