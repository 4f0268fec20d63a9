"""Make the stored adapters, heads and test sets from four full fine-tunes; nobody who runs the demo needs this.

    python -m demo.make_adapters SUITE

SUITE holds `experts/<task>.safetensors`, the task vector of a fine-tuned encoder and its `head.weight` and `head.bias`,
and `tasks/<task>.jsonl`, its test set, with the fields `text`, `label` (index) and `name` (of the label). Each
fine-tune goes through mergekit's own `mergekit-extract-lora`; the factors are then stored as bfloat16.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

RANKS = {"movie": 8, "tweets": 8, "wnsup": 24, "debsec": 24}
"""Smallest multiple of 8 at which an adapter keeps 98.5 percent of its fine-tune's accuracy on the test set."""
FOLDER = Path(__file__).resolve().parent


def store_tasks(suite: Path) -> None:
    """Store every task's labels, test set and classifier head in the demo's folder."""
    labels: dict[str, list[str]] = {}
    heads: dict[str, torch.Tensor] = {}
    (FOLDER / "tasks").mkdir(exist_ok=True)
    for name in RANKS:
        rows = [json.loads(line) for line in (suite / "tasks" / f"{name}.jsonl").read_text("utf-8").splitlines()]
        labels[name] = [label for _, label in sorted({(row["label"], row["name"]) for row in rows})]
        with open(FOLDER / "tasks" / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for row in rows:
                print(json.dumps({"label": row["name"], "text": row["text"]}, ensure_ascii=False), file=file)
        expert = load_file(suite / "experts" / f"{name}.safetensors")
        heads |= {f"{name}.{kind}": expert[f"head.{kind}"].float() for kind in ("weight", "bias")}
    (FOLDER / "tasks" / "labels.json").write_text(json.dumps(labels, indent=2) + "\n", encoding="utf-8")
    save_file(heads, FOLDER / "tasks" / "heads.safetensors")


def write_fine_tune(suite: Path, name: str, folder: Path) -> None:
    """Write the full fine-tune as a checkpoint like the base, with float32 weights."""
    from demo.base import base_model  # needs the stored tasks

    model = base_model()
    weights = model.state_dict()
    for key, delta in load_file(suite / "experts" / f"{name}.safetensors").items():
        if not key.startswith(("head.", "pooler.")):  # mean pooling does not use the pooler
            weights[f"roberta.{key}"] += delta.float()
    model.load_state_dict(weights)
    model.save_pretrained(folder)


def extract_adapter(base: Path, fine_tune: Path, adapter: Path, rank: int) -> None:
    """Run `mergekit-extract-lora` on the linear layers of the encoder, and store its factors as bfloat16 for peft."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "mergekit.scripts.extract_lora", "--max-rank", str(rank)]
        command += ["--model", str(fine_tune), "--base-model", str(base), "--out-path", scratch]
        command += ["--include-regex", r"encoder\.layer", "--exclude-regex", "embeddings|LayerNorm"]
        subprocess.run(command, check=True)
        factors = load_file(Path(scratch) / "adapter_model.safetensors")
        config = json.loads((Path(scratch) / "adapter_config.json").read_text("utf-8"))
    config |= {
        "base_model_name_or_path": "demo/out/base",
        "target_modules": sorted(config["target_modules"]),
        # mergekit stores the change of each bias, which peft reads only when told to, and calls all models causal.
        "lora_bias": True,
        "task_type": None,
    }
    adapter.mkdir(parents=True, exist_ok=True)
    stored = {key: factor.to(torch.bfloat16).contiguous() for key, factor in factors.items()}
    save_file(stored, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    (adapter / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Make everything, and print what each adapter keeps of its full fine-tune's accuracy."""
    parser = argparse.ArgumentParser(description="Make the demo's adapters from full fine-tunes.")
    parser.add_argument("suite", type=Path)
    suite = parser.parse_args().suite
    store_tasks(suite)

    from demo.base import write_base
    from demo.scoring import accuracy, load
    from demo.tasks import TASKS

    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "base"
        write_base(base)
        tokenizer = AutoTokenizer.from_pretrained(base)
        for task in TASKS:
            fine_tune = Path(scratch) / task.name
            write_fine_tune(suite, task.name, fine_tune)
            extract_adapter(base, fine_tune, task.adapter, RANKS[task.name])
            full = accuracy(load(fine_tune), tokenizer, task)
            kept = accuracy(load(base, task.adapter), tokenizer, task)
            start = accuracy(load(base), tokenizer, task)
            print(f"{task.name}: base {start:.4f}, full fine-tune {full:.4f}, adapter {kept:.4f}")


if __name__ == "__main__":
    main()
