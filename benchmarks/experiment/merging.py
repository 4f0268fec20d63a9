"""Merging through mergekit's own commands: `mergekit-yaml`, or `mergekit-pytorch` for what it cannot plan.

The command's click entry point is called in this process, so that torch is imported once and not for every merge; from
the arguments on it is the installed command's code path.
"""

import shutil
import time
from pathlib import Path

import yaml
from mergekit.merge_methods.registry import registered_methods
from mergekit.scripts import merge_raw_pytorch, run_yaml

import mergekit_ace
from mergekit_ace.cli.moments import moments as moments_command

from .contending import register_contenders
from .settings import Setting

RANDOM_SEED = "0"
WEIGHTS = "model.safetensors"


def recipe(setting: Setting, base: Path, experts: list[Path], moments: Path | None = None) -> str:
    """The YAML text; float32 arithmetic and output whatever the checkpoints' dtype, so no rounding is added."""
    content: dict[str, object] = {
        "merge_method": setting.method,
        "models": [{"model": str(expert)} for expert in experts],
        "dtype": "float32",
    }
    if setting.takes_base:
        content["base_model"] = str(base)
    parameters = dict(setting.parameters) | ({"moments": str(moments)} if moments else {})
    if parameters:
        content["parameters"] = parameters
    return yaml.safe_dump(content, sort_keys=False)


def registered(method: str) -> bool:
    """Whether mergekit, with this project's plugin and the contenders, knows the method."""
    mergekit_ace.register()
    register_contenders()
    return method in {known.spec.name for known in registered_methods()}


def measure_moments(setting: Setting, base: Path, experts: list[Path], prompts: list[Path], out: Path) -> None:
    """Write the moments of each expert's prompts, or of its own texts, into `out`, by `mergekit-ace moments`."""
    config = out.with_name(f"{out.name}.yaml")
    config.write_text(recipe(setting, base, experts), encoding="utf-8")
    given = [f"--prompts={expert}={file}" for expert, file in zip(experts, prompts, strict=True)]
    if setting.self_prompts:
        given = [f"--self-prompts={setting.self_prompts}"]
    if setting.by_expert:
        given += ["--by", "expert"]
    moments_command.main(args=[str(config), *given, "--out", str(out), "--quiet"], standalone_mode=False)


def merge(
    setting: Setting, base: Path, experts: list[Path], out: Path, *, command: str, moments: Path | None = None
) -> float:
    """Write the merged checkpoint into `out`; returns the wall seconds it took."""
    out.mkdir(parents=True)
    config = out / "recipe.yaml"
    options = [str(config), str(out), "--random-seed", RANDOM_SEED, "--quiet"]
    started = time.perf_counter()
    if command == "mergekit-pytorch":
        files = [expert / WEIGHTS for expert in experts]
        config.write_text(recipe(setting, base / WEIGHTS, files), encoding="utf-8")
        merge_raw_pytorch.main.main(args=options, standalone_mode=False)
        shutil.copy(base / "config.json", out)
    else:
        config.write_text(recipe(setting, base, experts, moments), encoding="utf-8")
        run_yaml.main.main(args=[*options, "--no-copy-tokenizer"], standalone_mode=False)
    return time.perf_counter() - started
