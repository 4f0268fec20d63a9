"""Models of a recipe whose weights are quantized: their codes must not be merged as if they were weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mergekit.common import ModelPath

from mergekit_ace.checkpoints.quantized import quantization_of_tensors
from mergekit_ace.checkpoints.sources import model_headers, read_json
from mergekit_ace.mergekit_internals import in_recipe_order
from mergekit_ace.quantization import CONFIGURATION_FILES, Quantization, from_configuration
from mergekit_ace.recipe.failures import READING
from mergekit_ace.recipe.findings import Finding
from mergekit_ace.recipe.reading import Recipe


def check_quantization(recipe: Recipe) -> Iterator[Finding]:
    """Quantized bases and experts, the bases of adapters included."""
    seen: set[ModelPath] = set()
    for model in in_recipe_order(recipe.config):
        if model.model in seen:
            continue
        seen.add(model.model)
        adapter = f", the base of the adapter {model.lora}," if model.lora is not None else ""
        yield from quantized(model.model, f"{model.model}{adapter}")


def quantized(source: ModelPath, called: str) -> Iterator[Finding]:
    """An error where a model, or a single file of tensors, is quantized."""
    try:
        headers = model_headers(source)
    except READING:  # reported by the checks of files
        headers = {}
    by_tensors = quantization_of_tensors(headers)
    told = _by_files(source) or by_tensors
    if told is None:
        return
    remedy = told.remedy(None if Path(source.path).is_file() else str(source.path))
    if headers and by_tensors is None:
        remedy = f"Its tensors look plain: if they are, remove the entry ({told.evidence}). {remedy}"
    yield Finding(
        level="error",
        what=f"{called} is quantized ({told.format}: {told.evidence}); its codes cannot be merged as weights",
        remedy=remedy,
    )


def _by_files(source: ModelPath) -> Quantization | None:
    configuration = read_json(source, "config.json")
    if configuration is not None and (told := from_configuration(configuration)) is not None:
        return told
    for name, (method, form) in CONFIGURATION_FILES.items():
        if Path(source.path, name).is_file():
            return Quantization(method=method, format=form, evidence=f"it has {name}")
    return None
