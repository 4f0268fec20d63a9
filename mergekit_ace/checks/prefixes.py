"""Tensors that are there under another beginning: what wrappers of modules leave in the names of a checkpoint."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence

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
    """Why tensors are missing, and the remedy, where the checkpoint holds them under other names.

    Args:
        missing: names that were looked for.
        held: names of the checkpoint.
    """
    return longer_names_remedy(missing, held) or (_other_beginning(missing, held) if missing else None)


def longer_names_remedy(missing: Sequence[str], held: Collection[str]) -> tuple[str, str] | None:
    """As `renamed_remedy`, for longer names alone: of two models those are the ones that something has changed."""
    if not missing:
        return None
    for token, wrapper in _WRAPPERS.items():
        stripped = {name.replace(token, "") for name in held if token in name}
        if stripped and all(name in stripped for name in missing):
            return f"its names hold {token!r}, which {wrapper} puts there", _remedy(token)
    prefixes = Counter(other.removesuffix(name) for name in missing for other in held if other.endswith(f".{name}"))
    if prefixes and (common := prefixes.most_common(1)[0])[1] == len(missing):
        return f"its names begin with {common[0]!r}", _remedy(common[0], beginning=True)
    return None


def _other_beginning(missing: Sequence[str], held: Collection[str]) -> tuple[str, str] | None:
    """As `renamed_remedy`, where all of them begin otherwise, with nothing or with the name of another module."""
    endings: dict[str, list[str]] = defaultdict(list)
    for name in held:
        for beginning, ending in _cuts(name):
            endings[ending].append(beginning)
    pairs: Counter[tuple[str, str]] = Counter()
    for name in missing:
        beginning, ending = next(((first, rest) for first, rest in _cuts(name) if rest in endings), ("", ""))
        pairs.update((beginning, other) for other in endings.get(ending, ()))
    if not pairs:
        return None
    (expected, found), count = pairs.most_common(1)[0]
    # A module beside the one that is missing, such as another layer, is none that was renamed.
    others = [
        name for name in held if expected and name.startswith(expected) and not (found and name.startswith(found))
    ]
    if count < len(missing) or not expected or others or any(map(str.isdigit, (expected + found).split("."))):
        return None
    if not found:
        return f"it holds them without {expected!r}", f"Put {expected!r} before each of those, with safetensors.torch."
    return (
        f"it holds them under {found!r} in place of {expected!r}",
        f"Rename them, {expected!r} + name.removeprefix({found!r}) for each, with safetensors.torch.",
    )


def _cuts(name: str) -> Iterator[tuple[str, str]]:
    """A name cut before each of its parts but the last, the longest ending first."""
    parts = name.split(".")
    for cut in range(len(parts) - 1 or 1):
        yield "".join(f"{part}." for part in parts[:cut]), ".".join(parts[cut:])


def _remedy(token: str, *, beginning: bool = False) -> str:
    shorter = f"name.removeprefix({token!r})" if beginning else f"name.replace({token!r}, '')"
    return (
        f"Take it out: tensors = load_file(FILE); save_file({{{shorter}: tensor for name, tensor in "
        "tensors.items()}, FILE, metadata={'format': 'pt'}) with safetensors.torch."
    )
