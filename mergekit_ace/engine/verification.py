"""A model's folder, read from end to end, against its index, configuration, tokenizer and record; whoever wrote it."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import safe_open
from torch import Tensor

from mergekit_ace.checkpoints.adapter_folders import ADAPTER_FILES, base_of_adapter
from mergekit_ace.checkpoints.fingerprint import file_digest
from mergekit_ace.engine import joining, parts
from mergekit_ace.engine.architecture import Expected, expected_tensors
from mergekit_ace.engine.contents import contents
from mergekit_ace.engine.provenance import RECORD, Record
from mergekit_ace.engine.shards import OutputTensor
from mergekit_ace.factors.opening import open_adapter
from mergekit_ace.recipe.failures import READING, message_of

_WEIGHTS = re.compile(r"^(?:model|pytorch_model)(?:-(\d+)-of-(\d+))?\.(?:safetensors|bin)$")
_SHOWN = 3


@dataclass
class Verification:
    """What was found."""

    folder: Path
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What could not be checked, and why."""
    files: int = 0
    tensors: int = 0
    nbytes: int = 0


def verify(folder: Path) -> Verification:
    """Check a model, or a part of one, against its index, its configuration, its tokenizer and its record.

    Every weight is read once; one tensor is held at a time.
    """
    found = Verification(folder)
    if (folder / parts.MANIFEST).exists():
        _verify_part(found)
        return found
    if base_of_adapter(folder) is not None:
        _verify_adapter(found)
        return found
    placed = _check_index(found)
    tensors = {name: tensor for file in placed.values() for name, tensor in file.items()}
    found.files, found.tensors = len(placed), len(tensors)
    found.nbytes = sum(tensor.nbytes for tensor in tensors.values())
    config = _json(folder / "config.json")
    if config is None:
        found.problems.append(f"{folder / 'config.json'} must be there and be JSON; it is not")
    else:
        _check_architecture(found, config, tensors)
        _check_vocabulary(found, config, tensors)
    _check_values(found, placed, config or {})
    _check_record(found)
    return found


def _verify_part(found: Verification) -> None:
    try:
        manifest = parts.read_manifest(found.folder)
        joining.verify_files(found.folder, manifest)
    except (ValueError, RuntimeError, OSError) as error:
        found.problems.append(message_of(error))
        return
    found.files = len(manifest.receipts)
    made = [tensor for receipt in manifest.receipts for tensor in receipt.tensors]
    found.tensors, found.nbytes = len(made), sum(tensor.nbytes for tensor in made)


def _verify_adapter(found: Verification) -> None:
    """Keys, shapes and configuration are those of an adapter that can be merged, and every number is finite."""
    files = [found.folder / name for name in ADAPTER_FILES if (found.folder / name).is_file()]
    found.files = len(files)
    for file in files:
        try:
            held = contents(file)
            found.tensors += len(held)
            found.nbytes += sum(tensor.nbytes for tensor in held.values())
        except READING as error:
            found.problems.append(f"{file.name} cannot be read: {message_of(error)}")
            return
    _check_values(found, {file: {} for file in files}, {})
    try:
        open_adapter(found.folder)
    except ValueError as error:
        found.problems.append(message_of(error))
    found.notes.append("this is an adapter: whether its base has these modules is not checked")


def _check_index(found: Verification) -> dict[Path, dict[str, OutputTensor]]:
    """The index and the files agree, and every tensor is in one file only."""
    folder = found.folder
    files = sorted(file for file in folder.iterdir() if _WEIGHTS.match(file.name)) if folder.is_dir() else []
    if not files:
        found.problems.append(f"{folder} must hold model.safetensors, or files that an index lists; it does not")
    placed: dict[Path, dict[str, OutputTensor]] = {}
    for file in files:
        try:
            placed[file] = contents(file)
        except READING as error:
            found.problems.append(f"{file.name} cannot be read: {message_of(error)}")
    counts = Counter(name for file in placed.values() for name in file)
    _report(found, "tensors are in more than one file", [name for name, count in counts.items() if count > 1])
    indexes = (folder / "model.safetensors.index.json", folder / "pytorch_model.bin.index.json")
    index = next((file for file in indexes if file.exists()), None)
    if index is None:
        if len(files) > 1:
            found.problems.append(f"{folder} has {len(files)} files of weights and no index")
        return placed
    listed = (_json(index) or {}).get("weight_map")
    if not isinstance(listed, dict):
        found.problems.append(f"{index.name} must be JSON with a weight_map; it is not")
        return placed
    held = {(name, file.name) for file, tensors in placed.items() for name in tensors}
    _report(
        found,
        f"tensors are not in the file that {index.name} names",
        [n for n, f in listed.items() if (n, f) not in held],
    )
    _report(found, f"tensors are not in {index.name}", [name for name in counts if name not in listed])
    _report(found, f"files are not in {index.name}", [file.name for file in files if file.name not in listed.values()])
    for file in files:
        match = _WEIGHTS.match(file.name)
        if match and match[2] and int(match[2]) != len(files):
            found.problems.append(f"{file.name} must be one of {int(match[2])} files; there are {len(files)}")
            break
    return placed


def _check_architecture(found: Verification, config: Mapping[str, Any], tensors: Mapping[str, OutputTensor]) -> None:
    """Names and shapes are those of the architecture, the dtype is that of the configuration."""
    expected = expected_tensors(found.folder, set(tensors))
    if isinstance(expected, str):
        found.notes.append(f"names and shapes are not checked: {expected}")
    else:
        _compare(found, expected, tensors)
    promised = config.get("dtype") or config.get("torch_dtype")
    sizes: dict[str, int] = defaultdict(int)
    for tensor in tensors.values():
        sizes[tensor.dtype] += tensor.nbytes
    if promised and sizes and (most := max(sizes, key=lambda dtype: sizes[dtype])) != str(promised):
        found.problems.append(f"config.json promises {promised} weights; most are {most}")


def _compare(found: Verification, expected: Expected, tensors: Mapping[str, OutputTensor]) -> None:
    _report(found, "tensors of the architecture are missing", list(expected.missing))
    _report(found, "tensors are not of the architecture", list(expected.foreign))
    _report(
        found,
        "tensors do not have the shape that config.json promises",
        [
            f"{name} {list(tensors[name].shape)} for {list(shape)}"
            for name, shape in expected.shapes.items()
            if tensors[name].shape != shape
        ],
    )


def _check_vocabulary(found: Verification, config: Mapping[str, Any], tensors: Mapping[str, OutputTensor]) -> None:
    size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    tables = [tensors[name] for name in tensors if _TABLE.search(name)]
    if isinstance(size, int):
        wrong = [f"{table.name} has {table.shape[0]} rows" for table in tables if table.shape[0] != size]
        _report(found, f"tables do not have the {size} rows of config.json's vocab_size", wrong)
    numbers = _token_numbers(found.folder)
    if numbers and tables:
        rows = min(table.shape[0] for table in tables)
        beyond = sorted(token for token, number in numbers.items() if number >= rows)
        _report(found, f"tokens have a number beyond the {rows} rows of the embedding table", beyond)


_TABLE = re.compile(r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|embed_in|lm_head|embed_out)\.weight$")


def _token_numbers(folder: Path) -> dict[str, int]:
    document = _json(folder / "tokenizer.json")
    if document is None:
        return {}
    listed = document.get("model", {}).get("vocab", {})
    # WordPiece and BPE map tokens to numbers; Unigram lists pairs of token and score.
    numbers = dict(listed) if isinstance(listed, dict) else {pair[0]: place for place, pair in enumerate(listed)}
    return numbers | {token["content"]: token["id"] for token in document.get("added_tokens", [])}


def _check_values(
    found: Verification, placed: Mapping[Path, Mapping[str, OutputTensor]], config: Mapping[str, Any]
) -> None:
    """Every weight is finite, and weights that the configuration ties are the same."""
    tied: dict[str, str] = {}
    infinite = []
    for file in placed:
        try:
            for name, tensor in _tensors(file):
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
                    infinite.append(name)
                if config.get("tie_word_embeddings") and _TABLE.search(name):
                    tied[name] = _digest(tensor)
        except READING as error:
            found.problems.append(f"{file.name} cannot be read: {message_of(error)}")
    _report(found, "tensors hold NaN or infinity", infinite)
    if len(set(tied.values())) > 1:
        found.problems.append(f"config.json ties {' and '.join(sorted(tied))}, whose weights differ")


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    if file.suffix == ".bin":
        yield from torch.load(file, map_location="cpu", weights_only=True, mmap=True).items()
        return
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 - not a mapping
            yield name, opened.get_tensor(name)


def _check_record(found: Verification) -> None:
    """Every file is as the merge wrote it."""
    file = found.folder / RECORD
    if not file.exists():
        found.notes.append(f"there is no {RECORD}: the files' digests are not checked")
        return
    try:
        record = Record.model_validate_json(file.read_bytes())
    except ValidationError:
        found.problems.append(f"{RECORD} must be as it was written; it is not")
        return
    there = {path.relative_to(found.folder).as_posix(): path for path in found.folder.rglob("*") if path.is_file()}
    _report(found, f"files of {RECORD} are missing", [name for name in record.files if name not in there])
    changed = [name for name, sha256 in record.files.items() if name in there and file_digest(there[name]) != sha256]
    _report(found, "files are not as the merge wrote them", changed)
    unknown = [name for name in there if name not in record.files and name != RECORD]
    _report(found, f"files are not in {RECORD}", unknown)


def _report(found: Verification, what: str, names: list[str]) -> None:
    if names:
        shown = ", ".join(sorted(names)[:_SHOWN])
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        found.problems.append(f"{what}: {shown}{more}")


def _json(file: Path) -> dict[str, Any] | None:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) else None
