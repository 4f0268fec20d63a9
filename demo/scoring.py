"""Accuracy of a model on the test set of each task.

    python -m demo.scoring BASE [MODEL...] --to FILE

writes JSON: the accuracy of each expert (BASE with its adapter) on its own task, of BASE and each merged MODEL on all.
"""

import argparse
import json
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForTokenClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from demo.tasks import MAX_TOKENS, TASKS, Task

BATCH = 64


@torch.inference_mode()
def task_logits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], task: Task
) -> torch.Tensor:
    """Logits of a task's labels, `[len(texts), len(task.labels)]`: the model's token logits, averaged over the text."""
    batch = tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    mask = batch["attention_mask"].unsqueeze(-1)
    return ((logits * mask).sum(1) / mask.sum(1))[:, task.label_slice]


def accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, limit: int | None = None) -> float:
    """Share of a task's test set, or of its first `limit` texts, that the model labels rightly."""
    texts, labels = task.test_set(limit)
    # Texts of like length share a batch, so that little is spent on padding.
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    right = 0
    for start in range(0, len(order), BATCH):
        chunk = order[start : start + BATCH]
        guesses = task_logits(model, tokenizer, [texts[i] for i in chunk], task).argmax(1)
        right += int((guesses == torch.tensor([labels[i] for i in chunk])).sum())
    return right / len(texts)


def load(folder: Path, adapter: Path | None = None) -> PreTrainedModel:
    """The model in `folder` in float32, with `adapter` merged into it if given, in evaluation mode."""
    model = AutoModelForTokenClassification.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model.eval()


def score(base: Path, merged: list[Path], limit: int | None = None) -> dict[str, dict[str, float]]:
    """Accuracies by model and task: `experts` each on its own task, `base` and every merged model on all tasks."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    scores = {"experts": {t.name: accuracy(load(base, t.adapter), tokenizer, t, limit) for t in TASKS}}
    for folder in (base, *merged):
        model = load(folder)
        scores[folder.name] = {task.name: accuracy(model, tokenizer, task, limit) for task in TASKS}
    return scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Score the demo's models.")
    parser.add_argument("base", type=Path)
    parser.add_argument("merged", type=Path, nargs="*")
    parser.add_argument("--to", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--limit", type=int, help="texts a task, all if not given")
    arguments = parser.parse_args()
    scores = score(arguments.base, arguments.merged, arguments.limit)
    arguments.to.write_text(json.dumps(scores, indent=2), encoding="utf-8")
