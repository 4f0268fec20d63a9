"""Models that mergekit reads under another name than the recipe writes: `@` marks a revision, `+` an adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mergekit_ace.recipe.findings import Finding


def check_paths(document: Mapping[str, Any]) -> Iterator[Finding]:
    """Names that mergekit takes apart though a folder has them, and revisions of folders, which have none."""
    seen: set[str] = set()
    for where, name in model_names(document):
        if name not in seen:
            seen.add(name)
            yield from _check_name(where, name)


def model_names(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Every model that a recipe names by a string, and where; of those written as mappings, none."""
    for key in ("base_model", "tokenizer_source"):
        if isinstance(document.get(key), str):
            yield key, document[key]
    tokenizer = document.get("tokenizer")
    if isinstance(tokenizer, Mapping) and isinstance(tokenizer.get("source"), str):
        yield "tokenizer.source", tokenizer["source"]
    yield from _in_module(document, "")
    modules = document.get("modules")
    for name, module in (modules if isinstance(modules, Mapping) else {}).items():
        if isinstance(module, Mapping):
            yield from _in_module(module, f"modules.{name}.")


def _in_module(module: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for index, entry in enumerate(_list(module.get("models"))):
        if isinstance(entry, Mapping) and isinstance(entry.get("model"), str):
            yield f"{prefix}models[{index}]", entry["model"]
    for index, part in enumerate(_list(module.get("slices"))):
        if not isinstance(part, Mapping):
            continue
        if isinstance(part.get("base_model"), str):
            yield f"{prefix}slices[{index}].base_model", part["base_model"]
        for number, source in enumerate(_list(part.get("sources"))):
            if isinstance(source, Mapping) and isinstance(source.get("model"), str):
                yield f"{prefix}slices[{index}].sources[{number}]", source["model"]


def _check_name(where: str, name: str) -> Iterator[Finding]:
    if not any(sign in name for sign in "@+"):
        return
    if Path(name).exists():
        read = " with the adapter ".join(_without_revision(part) for part in name.split("+"))
        yield Finding(
            level="error",
            what=f"{where}: mergekit does not read {name}, which is on this disk: it takes @ for a revision and + for "
            + (f"an adapter, and reads {read}" if name.count("+") < 2 and name.count("@") < 2 else "an adapter"),
            remedy=f"Write {_mapping(name)} in its place, or rename the folder.",
        )
        return
    parts = name.split("+")
    if len(parts) > 2:
        yield Finding(
            level="error",
            what=f"{where}: a model must be BASE or BASE+ADAPTER; got {name}, with {len(parts) - 1} signs +",
            remedy="Where a folder's own name has a +, write {model: {path: BASE}, lora: {path: ADAPTER}}.",
        )
        return
    for part in parts:
        yield from _check_part(where, part)


def _check_part(where: str, part: str) -> Iterator[Finding]:
    path, at, revision = part.partition("@")
    if not at:
        return
    if Path(part).exists() or "@" in revision:
        yield Finding(
            level="error",
            what=f"{where}: mergekit does not read {part}"
            + (", which is on this disk" if Path(part).exists() else ", with more than one @")
            + ": it takes @ for a revision",
            remedy="Write {model: {path: BASE}, lora: {path: ADAPTER}} in its place, or rename the folder.",
        )
    elif Path(path).exists():
        yield Finding(
            level="warning",
            what=f"{where}: {path} is on this disk, where there are no revisions: mergekit reads it as it is, and not "
            f"revision {revision}",
            remedy=f"Write {path}, or a name of the Hugging Face Hub where the revision matters.",
        )


def _without_revision(part: str) -> str:
    path, at, revision = part.partition("@")
    return f"{path} (revision {revision})" if at else path


def _mapping(name: str) -> str:
    return f"{{model: {{path: {name}}}}}"


def _list(entries: Any) -> list[Any]:
    return entries if isinstance(entries, list) else []
