"""What one adapter out of several costs: ours, full matrices and `mergekit-extract-lora`, and peft's `svd`.

    python -m benchmarks.adapters [--adapters 8] [--rank 16] [--shapes llama-3-8b] [--layers N] [--alone]

Ours merges every layer (or N, multiplied), from files to a file, and no base exists. The other two are measured on one
weight of every shape, and multiplied: base+adapter as matrices, merged by the same method and decomposed again, as
`mergekit-yaml` and `mergekit-extract-lora` do, without their reading and writing; and the arithmetic of peft's `svd`,
which sums the updates and decomposes the sum.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from mergekit_ace.matrix.expert import Expert
from mergekit_ace.matrix.merge import merge_by_covariance
from mergekit_ace.matrix.presets import ACE
from mergekit_ace.matrix.stored_task_vectors import StoredTaskVectors

SHAPES = {
    "llama-3-8b": (
        32,
        {
            "self_attn.q_proj": (4096, 4096),
            "self_attn.k_proj": (1024, 4096),
            "self_attn.v_proj": (1024, 4096),
            "self_attn.o_proj": (4096, 4096),
            "mlp.gate_proj": (14336, 4096),
            "mlp.up_proj": (14336, 4096),
            "mlp.down_proj": (4096, 14336),
        },
    ),
    "llama-3-70b": (
        80,
        {
            "self_attn.q_proj": (8192, 8192),
            "self_attn.k_proj": (1024, 8192),
            "self_attn.v_proj": (1024, 8192),
            "self_attn.o_proj": (8192, 8192),
            "mlp.gate_proj": (28672, 8192),
            "mlp.up_proj": (28672, 8192),
            "mlp.down_proj": (8192, 28672),
        },
    ),
}


def write_adapters(folder: Path, shapes: str, layers: int, count: int, rank: int, dtype: torch.dtype) -> Path:
    """Adapters of random factors, and a recipe for them."""
    for t in range(count):
        generator = torch.Generator().manual_seed(t)
        tensors = {}
        for layer in range(layers):
            for module, (m, n) in SHAPES[shapes][1].items():
                prefix = f"base_model.model.model.layers.{layer}.{module}"
                tensors[f"{prefix}.lora_A.weight"] = (torch.randn(rank, n, generator=generator) * n**-0.5).to(dtype)
                tensors[f"{prefix}.lora_B.weight"] = (torch.randn(m, rank, generator=generator) * 0.01).to(dtype)
        adapter = folder / f"adapter{t}"
        adapter.mkdir(parents=True)
        save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
        targets = [module.rpartition(".")[2] for module in SHAPES[shapes][1]]
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets}
        config |= {"base_model_name_or_path": "no/base", "task_type": "CAUSAL_LM"}
        (adapter / "adapter_config.json").write_text(json.dumps(config))
    recipe = folder / "recipe.yml"
    models = "".join(f"  - model: no/base+{folder}/adapter{t}\n" for t in range(count))
    # Random factors have no input directions in common, and would be averaged: let every layer be solved.
    parameters = "parameters:\n  correlation_threshold: 0\n"
    recipe.write_text(f"merge_method: ace\nbase_model: no/base\nmodels:\n{models}{parameters}")
    return recipe


def ours(recipe: Path, out: Path) -> tuple[float, float, float]:
    """Wall and processor seconds of the whole command, and its peak memory in bytes."""
    command = [str(Path(sys.executable).with_name("mergekit-ace")), "merge", str(recipe), str(out), "--adapter"]
    started = time.perf_counter()
    process = subprocess.Popen([*command, "--quiet"])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} ended with status {status}")
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def by_full_matrices(m: int, n: int, count: int, rank: int) -> None:
    """One weight by base+adapter as matrices: the merge by the same method, and the decomposition of what it gives."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(m, n, generator=generator) * 0.02
    experts = []
    for t in range(count):
        down, up = _factors(m, n, rank, generator)
        experts.append(Expert(name=str(t), tensor=base + up @ down))
    merged = (
        base + merge_by_covariance(StoredTaskVectors(base, experts), replace(ACE, correlation_threshold=0)).task_vector
    )
    del experts
    # As mergekit.scripts.extract_lora does it.
    left, singular_values, right = torch.linalg.svd(merged - base, full_matrices=False)
    kept = count * rank
    root = torch.diag(singular_values[:kept].sqrt())
    _ = left[:, :kept] @ root, root @ right[:kept]


def by_peft(m: int, n: int, count: int, rank: int) -> None:
    """One weight as peft's `add_weighted_adapter(combination_type="svd")` does it."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(m, n)
    for _ in range(count):
        down, up = _factors(m, n, rank, generator)
        total += up @ down
    kept = count * rank
    left, singular_values, right = torch.linalg.svd(total, full_matrices=True)
    _ = left[:, :kept] @ torch.diag(singular_values[:kept]), right[:kept]


def measured(how: Callable[[int, int, int, int], None], shapes: str, count: int, rank: int) -> tuple[float, float]:
    """Wall and processor seconds of all layers: every shape once, times how often there is one like it."""
    layers, modules = SHAPES[shapes]
    wall = processor = 0.0
    for (m, n), often in Counter(modules.values()).items():
        started, spent = time.perf_counter(), time.process_time()
        how(m, n, count, rank)
        seconds, used = time.perf_counter() - started, time.process_time() - spent
        print(f"  {how.__name__} {m} x {n}: {seconds:.1f} s, {used:.1f} s of processors", flush=True)
        wall, processor = wall + seconds * often * layers, processor + used * often * layers
    return wall, processor


def _factors(m: int, n: int, rank: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rank, n, generator=generator) * n**-0.5, torch.randn(m, rank, generator=generator) * 0.01


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, help="of ours  [default: all]")
    parser.add_argument("--alone", action="store_true", help="leave the others out")
    arguments = parser.parse_args()
    most, _ = SHAPES[arguments.shapes]
    layers = arguments.layers or most
    with tempfile.TemporaryDirectory() as scratch:
        folder, out = Path(scratch), Path(scratch) / "out"
        recipe = write_adapters(folder, arguments.shapes, layers, arguments.adapters, arguments.rank, torch.bfloat16)
        wall, processor, peak = ours(recipe, out)
        size = sum(file.stat().st_size for file in out.iterdir()) * most / layers
    wall, processor = wall * most / layers, processor * most / layers
    note = f"{peak / 1e9:.2f} GB at most, writes {size / 1e9:.2f} GB"
    rows = [("mergekit-ace merge --adapter", wall, processor, note)]
    if not arguments.alone:
        for name, how in (("full matrices, mergekit-extract-lora", by_full_matrices), ("peft, svd", by_peft)):
            taken, used = measured(how, arguments.shapes, arguments.adapters, arguments.rank)
            rows.append(
                (name, taken, used, f"every shape once, multiplied: {used / processor:.0f} times the processor")
            )
    print(
        f"{arguments.adapters} adapters of rank {arguments.rank}, {arguments.shapes}, {torch.get_num_threads()} threads"
    )
    for name, taken, used, note in rows:
        print(f"| {name} | {taken:.0f} s | {used:.0f} s of processors | {note} |")


if __name__ == "__main__":
    main()
