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

from mergekit_ace.checkpoints.headers import read_file
from mergekit_ace.checkpoints.quantized import quantization_of_tensors
from mergekit_ace.damaged_files import READING
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
            path = None if Path(model.model.path).is_file() else model.model.path
            raise ValueError(
                f"{model} must hold plain weights; it is quantized ({told.format}: {told.evidence}). "
                f"{told.remedy(path)}"
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
        return _by_configuration(path.parent) or _by_headers((path,), None)
    if path.is_dir() and (told := _by_configuration(path)) is not None:
        return told
    # mergekit-yaml has opened every model by the time it plans; those of the Hugging Face Hub are in its cache.
    loader = LoaderCache().loaders.get(model)
    if loader is None:
        return None
    folder, index = Path(loader.index.base_path), loader.index
    files = tuple(folder / shard.filename for shard in index.shards)
    return _by_configuration(folder) or _by_headers(files, tuple(index.tensor_paths))


def _by_configuration(folder: Path) -> Quantization | None:
    file = folder / "config.json"
    state = _state(file)
    return None if state is None else _read_configuration(file, state)


def _by_headers(files: tuple[Path, ...], names: tuple[str, ...] | None) -> Quantization | None:
    """By names and dtypes on disk.

    Args:
        files: that hold the tensors.
        names: of those that count; None for all.
    """
    return _read_headers(files, names, tuple(map(_state, files)))


def _state(file: Path) -> tuple[int, int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


# Asked once a tensor by mergekit. Keyed by time and size, for a file that is written anew in a long-lived process.
@lru_cache(maxsize=256)
def _read_configuration(file: Path, state: tuple[int, int]) -> Quantization | None:
    try:
        configuration = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return from_configuration(configuration) if isinstance(configuration, dict) else None


@lru_cache(maxsize=256)
def _read_headers(
    files: tuple[Path, ...], names: tuple[str, ...] | None, states: tuple[tuple[int, int] | None, ...]
) -> Quantization | None:
    try:
        headers = {name: header for file in files for name, header in read_file(file).items()}
    except READING:  # mergekit reads the file next, and reports it
        return None if names is None else from_names(names)
    counted = headers if names is None else {name: headers[name] for name in names if name in headers}
    return quantization_of_tensors(counted)
