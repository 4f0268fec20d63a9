"""The form of a suite: what `build` writes and what `score` prints. See benchmarks/README.md."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
import transformers
from transformers import PreTrainedModel

from .recipe import ADAPTERS, HEADS, Expert, Suite

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


class Kind(Protocol):
    """How the models of one kind of suite are trained and scored."""

    command: str
    """The mergekit command that plans these checkpoints."""

    def pretrained(self, suite: Suite) -> PreTrainedModel:
        """Train the common base from nothing."""
        ...

    def fine_tuned(self, suite: Suite, base: PreTrainedModel, expert: Expert, root: Path) -> PreTrainedModel:
        """Train one expert from the base; a head, which stays outside the merge, is written to `root/heads`."""
        ...

    def accuracies(self, tasks: Sequence[str], root: Path, folder: Path) -> dict[str, float]:
        """Test accuracy in [0, 1] of the checkpoint in `folder` on some tasks of the suite built in `root`."""
        ...

    def test_rows(self, suite: Suite, root: Path) -> dict[str, int]:
        """How many independent test rows each accuracy rests on."""
        ...


@runtime_checkable
class KindWithPrompts(Protocol):
    """A kind whose models are run on text."""

    def prompts(self, task: str, count: int) -> list[dict[str, str]]:
        """Training rows, as `mergekit-ace moments` takes them; the same first ones for every count."""
        ...

    def save_tokenizer(self, folder: Path) -> None:
        """Write the models' tokenizer."""
        ...


def write_prompts(kind: KindWithPrompts, suite: Suite, root: Path, out: Path, count: int) -> None:
    """Write `out/<task>.jsonl`, and the tokenizer that reads them into `root/base`."""
    kind.save_tokenizer(root / "base")
    out.mkdir(parents=True, exist_ok=True)
    for task in suite.tasks:
        lines = [json.dumps(row) + "\n" for row in kind.prompts(task, count)]
        (out / f"{task}.jsonl").write_text("".join(lines), encoding="utf-8")


def build(kind: Kind, suite: Suite, root: Path, reuse: Path | None = None) -> None:
    """Write `root/base`, `root/<task>`, `root/heads` and `root/suite.json`.

    `reuse` is a float32 suite built before: its base, and its experts of the same recipe, are copied and not trained.

    Raises:
        ValueError: the updates in `reuse` are scaled, so that they are not what its experts' recipes say.
    """
    (root / HEADS).mkdir(parents=True, exist_ok=True)
    base = load(reuse / "base") if reuse else kind.pretrained(suite)
    save(base, root / "base", suite.dtype)
    built = json.loads((reuse / "suite.json").read_text(encoding="utf-8"))["recipe"] if reuse else {}
    if built.get("update_scale", 1.0) != 1.0:
        raise ValueError(f"--reuse must be a suite of unscaled updates; got {reuse}")
    ready = built.get("experts", [])
    for expert in suite.experts:
        if reuse and json.loads(json.dumps(asdict(expert))) in ready:
            model = load(reuse / expert.task)
            for head in (reuse / HEADS).glob(f"{expert.task}.*"):
                shutil.copy(head, root / HEADS)
            if (reuse / ADAPTERS / expert.task).is_dir():
                shutil.copytree(reuse / ADAPTERS / expert.task, root / ADAPTERS / expert.task)
        else:
            model = kind.fine_tuned(suite, base, expert, root)
        scale_update_(model, base, suite.update_scale)
        save(model, root / expert.task, suite.dtype)
    write_facts(kind, suite, root)


def scale_update_(model: PreTrainedModel, base: PreTrainedModel, scale: float) -> None:
    """`base + scale * (model - base)`, in place; a scale of 1 leaves every bit."""
    if scale == 1.0:
        return
    with torch.no_grad():
        for tensor, origin in zip(model.state_dict().values(), base.state_dict().values(), strict=True):
            if tensor.is_floating_point():
                tensor.sub_(origin).mul_(scale).add_(origin)


def write_facts(kind: Kind, suite: Suite, root: Path) -> None:
    facts = {
        "command": kind.command,
        "tasks": list(suite.tasks),
        "test_rows": kind.test_rows(suite, root),
        "recipe": asdict(suite),
    }
    (root / "suite.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def score(kind: Kind, suite: Suite, root: Path, folders: list[Path]) -> None:
    """Print the experts' accuracies, then each model's, with its mean relative to the experts in percent."""
    expert = {task: kind.accuracies([task], root, root / task)[task] for task in suite.tasks}
    print("experts", {task: round(value, 4) for task, value in expert.items()})
    for folder in folders:
        found = kind.accuracies(suite.tasks, root, folder)
        relative = 100 * sum(found[task] / expert[task] for task in expert) / len(expert)
        print(f"{folder}: relative mean {relative:.2f}", {task: round(a, 4) for task, a in found.items()}, flush=True)


def load(folder: Path) -> PreTrainedModel:
    """The checkpoint as the class that its own config names, in float32."""
    name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    options = {"add_pooling_layer": False} if name == "ViTModel" else {}
    model: PreTrainedModel = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32, **options)
    return model.eval()


def save(model: PreTrainedModel, folder: Path, dtype: str) -> None:
    """Write a checkpoint in `dtype`, the model itself untouched."""
    weights = {name: tensor.to(getattr(torch, dtype)) for name, tensor in model.state_dict().items()}
    model.config.dtype = dtype
    model.save_pretrained(folder, state_dict=weights)
