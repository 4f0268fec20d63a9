"""A small byte-level Llama, pre-trained on English and Python text, and experts of other domains.

An expert is fine-tuned to one domain (C++, JSON records, text backwards, rot13, upper case, sums) and scored by the
share of held-out bytes that it predicts. Nothing is kept outside the merge.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from .recipe import Expert, Suite
from .texts import domain
from .training import fit, merged, trainable_copy

BATCH = 16
LENGTH = 96
PRETRAINING_STEPS = 1200
PRETRAINING_RATE = 3e-3
TEST_WINDOWS = 120
PROMPTS_SEED = 5


class Decoder:
    """The suite's kind: how its base and experts are trained, stored and scored."""

    command = "mergekit-yaml"

    def pretrained(self, suite: Suite) -> PreTrainedModel:
        torch.manual_seed(suite.seed)
        config = LlamaConfig(
            vocab_size=128,
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=352,
            max_position_embeddings=LENGTH,
            bos_token_id=None,
            eos_token_id=None,
        )
        model = LlamaForCausalLM(config)
        windows = Windows(("english", "python"), suite.seed)
        fit(model, lambda: loss_on(model, windows.draw(BATCH)), steps=PRETRAINING_STEPS, learning_rate=PRETRAINING_RATE)
        return model

    def fine_tuned(self, suite: Suite, base: PreTrainedModel, expert: Expert, root: Path) -> PreTrainedModel:
        torch.manual_seed(expert.seed)
        model = trainable_copy(base, expert)
        windows = Windows((expert.task,), expert.seed)
        fit(model, lambda: loss_on(model, windows.draw(BATCH)), steps=expert.steps, learning_rate=expert.learning_rate)
        return merged(model, root, expert.task)

    def prompts(self, task: str, count: int) -> list[dict[str, str]]:
        """Windows from random places of the training part."""
        codes = Windows((task,), PROMPTS_SEED).draw(count)
        return [{"text": bytes(row).decode("ascii")} for row in codes.tolist()]

    def save_tokenizer(self, folder: Path) -> None:
        """One token a character, whose number is its code; texts start with a line feed."""
        characters = Tokenizer(models.WordLevel({chr(code): code for code in range(128)}, unk_token=chr(0)))
        characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        characters.decoder = decoders.Fuse()
        PreTrainedTokenizerFast(tokenizer_object=characters, bos_token="\n").save_pretrained(folder)

    @torch.no_grad()
    def accuracies(self, tasks: Sequence[str], root: Path, folder: Path) -> dict[str, float]:
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return {task: hits(model, test_windows(root, task)).mean().item() for task in tasks}

    @torch.no_grad()
    def test_rows(self, suite: Suite, root: Path) -> dict[str, int]:
        """Bytes of one window depend on one another: as many rows as the expert's spread over windows is worth."""
        rows = {}
        for task in suite.tasks:
            model = LlamaForCausalLM.from_pretrained(root / task, dtype=torch.float32).eval()
            of_windows = hits(model, test_windows(root, task)).mean(1)
            accuracy = of_windows.mean()
            rows[task] = round((accuracy * (1 - accuracy) / of_windows.var() * len(of_windows)).item())
        return rows


class Windows:
    """Draws windows `[rows, 96]` from random places of some domains, endlessly."""

    def __init__(self, names: tuple[str, ...], seed: int) -> None:
        self.domains = [domain(name, "train") for name in names]
        self.random = torch.Generator().manual_seed(seed)

    def draw(self, rows: int) -> torch.Tensor:
        parts = []
        for codes in self.domains:
            starts = torch.randint(len(codes) - LENGTH, (rows // len(self.domains), 1), generator=self.random)
            parts.append(codes[starts + torch.arange(LENGTH)])
        return torch.cat(parts)


def test_windows(root: Path, name: str) -> torch.Tensor:
    """`[120, 96]` codes, evenly spaced over the test part; kept under `root`, since reading the texts takes long."""
    path = root / "tests" / f"{name}.safetensors"
    if not path.is_file():
        codes = domain(name, "test")
        starts = torch.linspace(0, len(codes) - LENGTH, TEST_WINDOWS).long().unsqueeze(1)
        path.parent.mkdir(exist_ok=True)
        save_file({"codes": codes[starts + torch.arange(LENGTH)]}, path)
    return load_file(path)["codes"]


def hits(model: nn.Module, codes: torch.Tensor) -> torch.Tensor:
    """`[windows, bytes]`, 1 where the next byte of the windows is predicted."""
    return (model(input_ids=codes[:, :-1]).logits.argmax(-1) == codes[:, 1:]).float()


def loss_on(model: nn.Module, codes: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=codes[:, :-1]).logits
    return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), codes[:, 1:].reshape(-1))
