"""Tensors that are there under another beginning: what wrappers of modules leave in the names of a checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

# What stands anywhere in a name, and who put it there.
_WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
    "base_layer.": "peft",
    "base_model.model.": "peft",
    "module.": "DataParallel",
}


def renamed_remedy(missing: Sequence[str], held: Collection[str]) -> tuple[str, str] | None:
    """Why tensors are missing, and the remedy, where the checkpoint holds them under longer names.

    Args:
        missing: names that were looked for.
        held: names of the checkpoint.
    """
    if not missing:
        return None
    for token, wrapper in _WRAPPERS.items():
        stripped = {name.replace(token, "") for name in held if token in name}
        if stripped and all(name in stripped for name in missing):
            return f"its names hold {token!r}, which {wrapper} puts there", _remedy(token)
    prefixes = Counter(other.removesuffix(name) for name in missing for other in held if other.endswith(f".{name}"))
    if prefixes and (common := prefixes.most_common(1)[0])[1] == len(missing):
        return f"its names begin with {common[0]!r}", _remedy(common[0])
    return None


def _remedy(token: str) -> str:
    return (
        f"Take it out: tensors = load_file(FILE); save_file({{name.replace({token!r}, ''): tensor for name, tensor in "
        "tensors.items()}, FILE, metadata={'format': 'pt'}) with safetensors.torch."
    )
