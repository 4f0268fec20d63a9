"""How far one merged adapter, put into the base by peft, is from the model merged of full weights.

python -m demo.agreement BASE ADAPTER MODEL --to FILE
"""

import argparse
import json
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file
from transformers import AutoModelForTokenClassification


def disagreement(base: Path, adapter: Path, model: Path) -> dict[str, float]:
    """Largest difference of a weight; norm of all differences over that of the change; sizes in bytes."""
    start = load_file(base / "model.safetensors")
    merged = load_file(model / "model.safetensors")
    adapted = peft.PeftModel.from_pretrained(AutoModelForTokenClassification.from_pretrained(base), adapter)
    weights = adapted.merge_and_unload().state_dict()
    difference = torch.cat([(weights[name] - tensor).flatten().double() for name, tensor in merged.items()])
    change = torch.cat([(tensor - start[name]).flatten().double() for name, tensor in merged.items()])
    return {
        "largest_difference": float(difference.abs().max()),
        "relative_difference": float(difference.norm() / change.norm()),
        "adapter_bytes": (adapter / "adapter_model.safetensors").stat().st_size,
        "model_bytes": (model / "model.safetensors").stat().st_size,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compare one merged adapter with the merged model.")
    for folder in ("base", "adapter", "model"):
        parser.add_argument(folder, type=Path)
    parser.add_argument("--to", type=Path, required=True)
    arguments = parser.parse_args()
    found = disagreement(arguments.base, arguments.adapter, arguments.model)
    arguments.to.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
