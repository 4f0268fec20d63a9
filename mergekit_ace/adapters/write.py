"""A merged adapter as a folder: tensors, configuration, card, recipe and report."""

from __future__ import annotations

from pathlib import Path

import yaml

from mergekit_ace.adapters.request import Request
from mergekit_ace.adapters.result import AdapterReport, MergedAdapter, Outcome, write_json
from mergekit_ace.adapters.streaming import TensorFile
from mergekit_ace.factors.opening import CONFIGURATION, WEIGHTS

REPORT = "merge_report.json"
RECIPE = "mergekit_config.yml"
_METADATA = {"format": "pt"}
_FILES = {"peft": WEIGHTS, "diffusers": "pytorch_lora_weights.safetensors", "kohya": "lora.safetensors"}


def write_merge(request: Request, folder: Path, *, recipe: str | None = None) -> AdapterReport:
    """Merge into a folder that is there; one weight is held at a time.

    Args:
        request: what to merge.
        folder: to write to.
        recipe: its text, kept beside the adapter.

    Raises:
        AdapterError, FactorizationError, OverflowError, OSError: as the merge and the disk.
    """
    outcome = Outcome(request)
    with TensorFile(folder / _FILES[outcome.layout], outcome.names(), _METADATA) as file:
        for name, tensor in outcome.tensors():
            file.add(name, tensor)
    configuration = outcome.configuration.document() if outcome.layout == "peft" else None
    _write_rest(folder, configuration, outcome.report, recipe)
    return outcome.report


def write_merged(merged: MergedAdapter, folder: Path) -> None:
    """Write an adapter that is in memory to a folder that is there."""
    with TensorFile(folder / _FILES[merged.layout], list(merged.tensors), _METADATA) as file:
        for name, tensor in merged.tensors.items():
            file.add(name, tensor)
    _write_rest(folder, merged.configuration, merged.report, None)


def _write_rest(
    folder: Path, configuration: dict[str, object] | None, report: AdapterReport, recipe: str | None
) -> None:
    if configuration is not None:
        write_json(configuration, folder / CONFIGURATION)
    write_json(report.document(), folder / REPORT)
    if recipe is not None:
        (folder / RECIPE).write_text(recipe, encoding="utf-8")
    (folder / "README.md").write_text(_card(folder.name, report, recipe), encoding="utf-8")


def _card(name: str, report: AdapterReport, recipe: str | None) -> str:
    """For people, and for hubs, which read its head."""
    head = {"library_name": "peft", "tags": ["mergekit", "mergekit-ace", "merge", "lora"]}
    if report.base and not report.base.startswith(("/", ".", "~")):
        head["base_model"] = report.base
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False).rstrip(),
        "---",
        f"# {name}",
        "",
        f"One adapter out of {len(report.adapters)}, merged by `{report.method}` of mergekit-ace"
        + (f", for {report.base}." if report.base else "."),
        "",
        *(f"- {adapter}" for adapter in report.adapters),
        "",
        f"Rank {report.rank}; it holds {report.energy_kept:.1%} of the merged updates' energy. "
        f"`{REPORT}` has every weight.",
    ]
    if recipe is not None:
        lines += ["", "```yaml", recipe.rstrip(), "```"]
    return "\n".join(lines) + "\n"
