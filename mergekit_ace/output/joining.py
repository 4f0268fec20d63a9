"""Joining the parts of a merge into the model that the unsplit merge would have written."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mergekit.io import TensorWriter
from safetensors import safe_open

from mergekit_ace.output.parts import FILES, TENSORS, Manifest, digest, read_manifest, tensor_files

_SHOWN = 5


def verify(folders: Sequence[Path]) -> list[Manifest]:
    """Return the manifests of part folders that make up one whole merge, every tensor once and every file intact.

    Raises:
        ValueError: No part is given, parts belong to different merges, a tensor is missing or there twice, or a file
            of tensors is not as it was written.
    """
    if not folders:
        raise ValueError("parts to join must be at least one; got none")
    manifests = [read_manifest(folder) for folder in folders]
    first = manifests[0]
    for folder, manifest in zip(folders, manifests, strict=True):
        for field in type(first.merge).model_fields:
            expected, actual = getattr(first.merge, field), getattr(manifest.merge, field)
            if actual != expected:
                values = "" if field == "plan" else f" ({expected} and {actual})"
                raise ValueError(
                    f"parts must come from the same merge; got different {field}{values} in {folders[0]} and {folder}"
                )
    counts = Counter(name for manifest in manifests for name in manifest.tensors)
    _require_none("every tensor must be in a part", "missing", [n for n in first.merge.plan if not counts[n]])
    _require_none("every tensor must be in one part only", "repeated", [n for n, count in counts.items() if count > 1])
    _require_none("parts must hold tensors of the plan", "unknown", list(counts.keys() - set(first.merge.plan)))
    for folder, manifest in zip(folders, manifests, strict=True):
        _verify_files(folder, manifest)
    return manifests


def _require_none(requirement: str, what: str, names: Sequence[str]) -> None:
    if names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise ValueError(f"{requirement}; got {what} {', '.join(sorted(names)[:_SHOWN])}{more}")


def _verify_files(folder: Path, manifest: Manifest) -> None:
    for name, expected in manifest.sha256.items():
        file = folder / TENSORS / Path(name).name
        if not file.is_file() or digest(file) != expected:
            raise ValueError(
                f"part's files must be as they were written; got {file}, which is damaged or missing. "
                "Copy the part again, or merge it again"
            )
    held = set(tensor_files(folder))
    promised = set(manifest.tensors) - set(manifest.absent)
    if held != promised:
        raise ValueError(
            f"part must hold the tensors that it lists; got {folder}, which differs in "
            f"{', '.join(sorted(held ^ promised)[:_SHOWN])}"
        )


def write(folders: Sequence[Path], manifests: Sequence[Manifest], out: Path, shard_size: int | None = None) -> None:
    """Write the whole model, holding no more than one output file's tensors in memory.

    Args:
        folders: Part folders that `verify` has passed.
        manifests: Their manifests, as it returned them.
        out: An empty folder.
        shard_size: Bytes in an output file; as the parts' own merge had it if None.
    """
    merge = manifests[0].merge
    files = {name: file for folder in folders for name, file in tensor_files(folder).items()}
    writer: Any = TensorWriter(str(out), max_shard_size=merge.shard_size if shard_size is None else shard_size)
    with ExitStack() as stack:
        opened = {file: stack.enter_context(safe_open(file, framework="pt")) for file in set(files.values())}
        for name in merge.plan:
            if name in files:
                # A copy: safetensors will not write tensors that share the memory of one mapped file.
                writer.save_tensor(name, opened[files[name]].get_tensor(name), clone=True)
        writer.finalize()
    _copy_files(folders[0] / FILES, out, manifests[0].name)


def _copy_files(source: Path, out: Path, name: str) -> None:
    shutil.copytree(source, out, dirs_exist_ok=True)
    card = out / "README.md"
    if card.exists():
        text = card.read_text(encoding="utf-8")
        card.write_text(text.replace(f"\n# {name}\n", f"\n# {out.name}\n", 1), encoding="utf-8")
