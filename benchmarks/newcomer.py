"""The path of someone new, timed in a fresh environment: install, first check, first merge, first page, first adapter.

    python -m benchmarks.newcomer

Run from the root of a checkout, with any Python; the package index must be at hand. The models are the demo's: an
encoder of 22M parameters and four LoRA adapters of it. The commands are the README's. Everything is written to a
temporary folder.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "examples" / "yaml" / "demo.yml"
OFFLINE = os.environ | {"HF_HUB_OFFLINE": "1"}


def timed(what: str, *commands: Sequence[str | Path], environment: dict[str, str] | None = None) -> None:
    """Run commands in the checkout and print what they took together; end with the output of one that fails."""
    started = time.perf_counter()
    for command in commands:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{what}: {' '.join(map(str, command))} failed\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    print(f"{what:14} {time.perf_counter() - started:6.1f} s", flush=True)


def main() -> None:
    """Time every step."""
    with tempfile.TemporaryDirectory(prefix="newcomer-") as folder:
        place = Path(folder)
        python = place / "environment" / "bin" / "python"
        command = python.with_name("mergekit-ace")
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", "constraints.txt"]
        timed("install", [sys.executable, "-m", "venv", place / "environment"], [*pip, "torch"], [*pip, "."])
        timed(
            "demo's base",
            [*pip, "peft"],
            [python, "-m", "pip", "install", "--quiet", "--no-deps", "-r", "demo/requirements.txt"],
            [python, "-m", "demo.base", place / "base"],
        )
        recipe = place / "recipe.yml"
        adapters = ROOT / "demo" / "adapters"
        text = RECIPE.read_text(encoding="utf-8").replace("demo/out/base", str(place / "base"))
        recipe.write_text(text.replace("demo/adapters", str(adapters)), encoding="utf-8")
        flags = ["--lora-merge-cache", place / "cache", "--lora-merge-dtype", "float32"]
        timed("first check", [command, "check", recipe, *flags], environment=OFFLINE)
        timed("first merge", [command, "merge", recipe, place / "merged", *flags], environment=OFFLINE)
        page = ["--html", place / "report.html"]
        timed("first page", [command, "inspect", recipe, *page, *flags], environment=OFFLINE)
        timed("first adapter", [command, "merge", recipe, place / "adapter", "--adapter"], environment=OFFLINE)


if __name__ == "__main__":
    main()
