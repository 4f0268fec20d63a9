"""What a merge method can see of quantized inputs: the models that mergekit names to it, and dtypes.

A recipe's `dtype` has turned codes into floats before a method is handed a tensor. But mergekit tells a method its
inputs' names when it plans, and the models' files show what they hold.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from functools import lru_cache
from pathlib import Path

from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods.base import TensorGroup
from safetensors import safe_open

from mergekit_ace.printable import printable
from mergekit_ace.quantization import Quantization, from_configuration, from_names


def require_unquantized_models(models: Sequence[Hashable]) -> None:
    """Refuse models that are quantized by what their files hold; what is no `ModelReference` is passed over.

    Raises:
        ValueError: naming the model, the format and the remedy.
    """
    for model in models:
        if not isinstance(model, ModelReference):
            continue
        told = _quantization_of(model)
        if told is not None:
            raise ValueError(
                f"{model} must hold plain weights; it is quantized ({told.format}: {told.evidence}). "
                f"{told.remedy(model.model.path)}"
            )


def require_unquantized_tensors(group: TensorGroup) -> None:
    """Refuse 8-bit floats: they are codes of a scale that no method receives.

    Raises:
        ValueError: naming the tensor and the input.
    """
    for entry in group.entries:
        dtype = entry.tensor.dtype
        if dtype.is_floating_point and dtype.itemsize == 1:
            raise ValueError(
                f"{printable(group.metadata.name or 'the tensor')} must hold plain weights; {entry.id} has {dtype}, "
                "codes of a quantized model whose scales are another tensor. Dequantize it first"
            )


def _quantization_of(model: ModelReference) -> Quantization | None:
    path = Path(model.model.path)
    if path.is_file():  # mergekit-pytorch
        return _by_configuration(path.parent) or _by_header(path)
    if path.is_dir() and (told := _by_configuration(path)) is not None:
        return told
    # mergekit-yaml has opened every model by the time it plans; those of the Hugging Face Hub are in its cache.
    loader = LoaderCache().loaders.get(model)
    if loader is None:
        return None
    return _by_configuration(Path(loader.index.base_path)) or _by_names(tuple(loader.index.tensor_paths))


def _by_configuration(folder: Path) -> Quantization | None:
    file = folder / "config.json"
    try:
        status = file.stat()
    except OSError:
        return None
    return _read_configuration(file, status.st_mtime_ns, status.st_size)


# Asked once a tensor by mergekit. Keyed by time and size, for a file that is written anew in a long-lived process.
@lru_cache(maxsize=256)
def _read_configuration(file: Path, changed: int, size: int) -> Quantization | None:
    try:
        configuration = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return from_configuration(configuration) if isinstance(configuration, dict) else None


_by_names = lru_cache(maxsize=256)(from_names)


def _by_header(file: Path) -> Quantization | None:
    if file.suffix != ".safetensors":
        return None
    status = file.stat()
    return _read_header(file, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=256)
def _read_header(file: Path, changed: int, size: int) -> Quantization | None:
    with safe_open(file, framework="pt") as tensors:
        return from_names(tensors.keys())
