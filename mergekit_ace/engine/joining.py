"""Joining the parts of a merge into the model that the unsplit merge would have written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from safetensors import safe_open

from mergekit_ace.checkpoints.fingerprint import file_digest
from mergekit_ace.engine.contents import require_each_once, require_none
from mergekit_ace.engine.files import CARD, retitled, write_index
from mergekit_ace.engine.parts import CARD_NAME, FILES, TENSORS, Manifest, read_manifest
from mergekit_ace.engine.plan import Merge
from mergekit_ace.engine.provenance import write_record
from mergekit_ace.engine.receipt import Maker
from mergekit_ace.engine.shards import OutputTensor, arranged
from mergekit_ace.engine.tensor_file import TensorFile, layout


def verify(folders: Sequence[Path]) -> list[Manifest]:
    """Return the manifests of part folders that make up one whole merge, every tensor once and every file intact.

    Raises:
        ValueError: No part is given, parts belong to different merges or were made from different inputs, a tensor is
            missing or there twice, or a file is not as it was written.
    """
    if not folders:
        raise ValueError("parts to join must be at least one; got none")
    manifests = [read_manifest(folder) for folder in folders]
    for folder, manifest in zip(folders, manifests, strict=True):
        _require_same_merge(manifests[0], folders[0], manifest, folder)
    made = [tensor.name for manifest in manifests for receipt in manifest.receipts for tensor in receipt.tensors]
    absent = {name for manifest in manifests for receipt in manifest.receipts for name in receipt.absent}
    planned = {tensor.name for tensor in manifests[0].plan.merge.plan}
    require_none("every tensor must be in a part", "missing", sorted(planned - absent - set(made)))
    require_none("every tensor must be in one part only", "repeated", sorted({n for n in made if made.count(n) > 1}))
    require_none("parts must hold tensors of the plan", "unknown", sorted(set(made) - planned))
    for folder, manifest in zip(folders, manifests, strict=True):
        verify_files(folder, manifest)
    return manifests


def _require_same_merge(first: Manifest, first_folder: Path, manifest: Manifest, folder: Path) -> None:
    where = f"in {first_folder} and {folder}"
    for field in Merge.model_fields:
        expected, actual = getattr(first.plan.merge, field), getattr(manifest.plan.merge, field)
        if actual != expected:
            values = "" if field == "plan" else f" ({expected} and {actual})"
            raise ValueError(f"parts must come from the same merge; got different {field}{values} {where}")
    for name in sorted(first.plan.inputs.keys() | manifest.plan.inputs.keys()):
        ours, theirs = first.plan.inputs.get(name), manifest.plan.inputs.get(name)
        if ours is None or theirs is None or not ours.is_copy_of(theirs):
            raise ValueError(f"parts must be made from the same inputs; got different {name} {where}")
    different = sorted({name for name, _ in first.files.items() ^ manifest.files.items()})
    if different:
        raise ValueError(f"parts must have the same files; got different {different[0]} {where}")


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Raise unless a part folder's files are as they were written.

    Raises:
        ValueError: naming the file.
    """
    expected = {folder / TENSORS / receipt.file: receipt.sha256 for receipt in manifest.receipts if receipt.sha256}
    expected |= {folder / FILES / name: sha256 for name, sha256 in manifest.files.items()}
    for file, sha256 in expected.items():
        if not file.is_file() or file_digest(file) != sha256:
            raise ValueError(
                f"part's files must be as they were written; got {file}, which is damaged or missing. "
                "Copy the part again, or merge it again"
            )
    for place in (TENSORS, FILES):
        for file in sorted((folder / place).rglob("*")):
            if file.is_file() and file not in expected:
                raise ValueError(f"part must hold its own files only; got {file}. Remove it")
    for receipt in manifest.receipts:
        if receipt.sha256:
            require_each_once(receipt.tensors, [folder / TENSORS / receipt.file])


def makers(manifests: Sequence[Manifest]) -> list[str]:
    """The kinds of machines that made the parts: more than one may round differently."""
    found: list[Maker] = [receipt.maker for manifest in manifests for receipt in manifest.receipts]
    return sorted({maker.processor for maker in found})


def write(folders: Sequence[Path], manifests: Sequence[Manifest], out: Path, shard_size: int | None = None) -> None:
    """Put the whole model together; a shard that is in one part whole is linked or copied as it is.

    Args:
        folders: Part folders that `verify` has passed.
        manifests: Their manifests, as it returned them.
        out: An empty folder.
        shard_size: Bytes in an output file; as the parts' own merge had it if None.
    """
    merge = manifests[0].plan.merge
    receipts = {
        folder / TENSORS / receipt.file: receipt
        for folder, manifest in zip(folders, manifests, strict=True)
        for receipt in manifest.receipts
    }
    places = {tensor.name: file for file, receipt in receipts.items() for tensor in receipt.tensors}
    absent = {name for receipt in receipts.values() for name in receipt.absent}
    layout = arranged(merge.plan, merge.shard_size if shard_size is None else shard_size, absent)
    digests = {}
    for name, tensors in layout.items():
        sources = {places[tensor.name] for tensor in tensors}
        source = next(iter(sources))
        if len(sources) == 1 and set(receipts[source].tensors) == set(tensors):
            _put(source, out / name)
            digests[name] = receipts[source].sha256
        else:
            digests[name] = _collect(tensors, places, out / name)
    weights = {tensor.name: tensor for tensors in layout.values() for tensor in tensors}
    if len(layout) > 1:
        files = {tensor.name: name for name, tensors in layout.items() for tensor in tensors}
        write_index(weights, files, out, safetensors=True)
    shutil.copytree(folders[0] / FILES, out, dirs_exist_ok=True)
    card = out / CARD
    if card.exists():
        card.write_text(retitled(card.read_text(encoding="utf-8"), CARD_NAME, out.name), encoding="utf-8")
    require_each_once(tuple(weights.values()), [out / name for name in layout])
    write_record(merge, manifests[0].plan.inputs, digests, out)


def _put(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where the file system has no such thing."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _collect(tensors: Sequence[OutputTensor], places: dict[str, Path], file: Path) -> str:
    """Write tensors of several files to one, and return its SHA-256."""
    with ExitStack() as stack:
        files = {places[tensor.name] for tensor in tensors}
        opened = {source: stack.enter_context(safe_open(source, framework="pt")) for source in files}
        planned = layout(tensors)
        with TensorFile(file, planned) as writing:
            for tensor in planned:
                writing.write(tensor, opened[places[tensor.name]].get_tensor(tensor.name))
        return writing.finish()
