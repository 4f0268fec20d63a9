"""LoRA experts, merged into their base once and kept.

mergekit names an entry of its cache by the paths of base and adapter alone, and takes whatever is there: a retrained
adapter under an old path would not be merged, and an entry that a killed run left half-written would be. Here an entry
lies in a folder named by the content of both, and appears whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from mergekit.common import ModelPath, ModelReference
from mergekit.io import ShardedTensorIndex
from mergekit.options import MergeOptions

from mergekit_ace.checkpoints.fingerprint import file_digest, fingerprint
from mergekit_ace.mergekit_internals import adapter_entry_name
from mergekit_ace.staging import staged

LOG = logging.getLogger("mergekit_ace")

_CONFIG = "config.json"
_CONTENT = (".safetensors", ".bin", ".json")


def merged_adapter(model: ModelReference, options: MergeOptions) -> ModelReference:
    """The model that `base+adapter` is, merged now unless the cache has it, which is logged.

    Raises:
        RuntimeError: no `--lora-merge-cache` was given.
        BlockingIOError: another process is merging the same adapter.
    """
    cache = adapter_folder(model, options)
    entry = cache / adapter_entry_name(model)
    if entry.is_dir():
        LOG.info("Taking %s from the adapter cache: %s", model, entry)
        return ModelReference(model=ModelPath(path=str(entry)))
    try:
        with staged(entry) as folder:
            folder.rmdir()  # mergekit makes it
            model.merged(
                cache_dir=str(folder.parent),
                trust_remote_code=options.trust_remote_code,
                lora_merge_dtype=options.lora_merge_dtype,
            )
    except BaseException:
        with contextlib.suppress(OSError):  # not empty: another process is at it
            cache.rmdir()
        raise
    return ModelReference(model=ModelPath(path=str(entry)))


def adapter_folder(model: ModelReference, options: MergeOptions) -> Path:
    """The folder of the cache that holds the entry for the present content of base and adapter."""
    assert model.lora is not None
    if not options.lora_merge_cache:
        raise RuntimeError(f"the adapter of {model} must be merged into its base first; add --lora-merge-cache FOLDER")
    content = {
        "base": _content(model.model, _of_base),
        "adapter": _content(model.lora, _of_adapter),
        "dtype": options.lora_merge_dtype,
    }
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return Path(options.lora_merge_cache, key[:16])


def _content(path: ModelPath, describe: Callable[[Path], object]) -> object:
    folder = Path(path.path)
    if folder.is_dir():
        return describe(folder)
    # A hub's name. Its commit is the name of the folder in the hub's cache, if it is there already.
    held = (
        try_to_load_from_cache(path.path, name, revision=path.revision) for name in ("adapter_config.json", _CONFIG)
    )
    return [path.path, path.revision, next((Path(file).parent.name for file in held if isinstance(file, str)), None)]


def _of_adapter(folder: Path) -> object:
    files = sorted(file for file in folder.iterdir() if file.suffix in _CONTENT and file.is_file())
    return {file.name: file_digest(file) for file in files}


def _of_base(folder: Path) -> object:
    """The weights and the configuration; other weights beside them, such as consolidated ones, are not read."""
    names = {shard.filename for shard in ShardedTensorIndex.from_disk(str(folder)).shards} | {_CONFIG}
    found = {name: fingerprint(folder / name) for name in sorted(names) if (folder / name).is_file()}
    return {name: [found[name].digest, found[name].changed] for name in found}
