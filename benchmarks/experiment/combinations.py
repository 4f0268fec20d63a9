"""What adapter users have today: peft's own combinations of adapters, and RobustMerge.

They take the adapters as peft wrote them and give one adapter; its base with it merged in is scored like any merge.
"""

import time
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from benchmarks.suites.form import load, save
from benchmarks.suites.recipe import ADAPTERS

from .contenders import robust_factors
from .settings import Setting

NAME = "combined"
SEED = 0


def combine(setting: Setting, root: Path, tasks: list[str], out: Path) -> float:
    """Write the base with the combined adapter merged in, in float32; returns the wall seconds it took.

    Raises:
        ValueError: peft or RobustMerge cannot combine these adapters; both join A and B only where ranks are equal.
    """
    started = time.perf_counter()
    model = adapted(root, tasks)
    options = dict(setting.parameters)
    kind = str(options.pop("combination"))
    weight = float(options.pop("weight", 1 / len(tasks)))
    torch.manual_seed(SEED)
    if kind == "robust_merge":
        # peft makes the modules; their factors are then replaced
        add(model, tasks, 1 / len(tasks), combination_type="linear")
        robust_merge_(model, tasks)
    else:
        add(model, tasks, weight, combination_type=kind, svd_full_matrices=False, **options)
    model.set_adapter(NAME)
    save(model.merge_and_unload(adapter_names=[NAME]), out, "float32")
    return time.perf_counter() - started


def adapted(root: Path, tasks: list[str]) -> PeftModel:
    """The suite's base with all adapters, of which none is active."""
    first, *others = tasks
    model = PeftModel.from_pretrained(load(root / "base"), root / ADAPTERS / first, adapter_name=first)
    for task in others:
        model.load_adapter(root / ADAPTERS / task, adapter_name=task)
    return model


def add(model: PeftModel, tasks: list[str], weight: float, **options: object) -> None:
    model.base_model.add_weighted_adapter(tasks, [weight] * len(tasks), adapter_name=NAME, **options)


@torch.no_grad()
def robust_merge_(model: PeftModel, tasks: list[str]) -> None:
    """Replace the combined adapter's factors."""
    for module in model.modules():
        if isinstance(module, LoraLayer) and NAME in module.lora_A:
            first, second = robust_factors(
                [module.lora_A[task].weight for task in tasks],
                [module.scaling[task] * module.lora_B[task].weight for task in tasks],
            )
            module.lora_A[NAME].weight.copy_(first)
            module.lora_B[NAME].weight.copy_(second / module.scaling[NAME])
