"""What a recipe's entries must be, each in words: every wrong one in a single run, before a file is opened."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference, dtype_from_name
from mergekit.merge_methods.registry import registered_methods
from mergekit.tokenizer.config import ModelTokenEmbedding, TokenEmbeddingConfig, ZeroEmbedding

from mergekit_ace.mergekit_internals import chat_template_names
from mergekit_ace.recipe.blocks import Block, blocks_of
from mergekit_ace.recipe.findings import Finding
from mergekit_ace.recipe.nearest_name import did_you_mean
from mergekit_ace.recipe.roles import check_roles, models_of

_DTYPES = ("float32", "bfloat16", "float16", "float64")
# What people write for them elsewhere.
_DTYPE_NAMES = {"bf16": "bfloat16", "bfloat": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}
_DTYPE_NAMES |= {"float": "float32", "double": "float64", "fp64": "float64"}
# Similarity from which a word is a misspelled one; phi-base, which may be a model, has 0.67 to base.
_SURELY = 0.75
_SHORTEST_TEMPLATE = 20
_INPUTS = ("models", "slices", "modules")


def check_values(document: Mapping[str, Any]) -> Iterator[Finding]:
    """Entries of another type than mergekit reads, unknown dtypes, layer ranges that are none, missing models."""
    for key in ("dtype", "out_dtype"):
        yield from _check_dtype(key, document.get(key))
    yield from _check_chat_template(document.get("chat_template"))
    if document.get("base_model") is not None:
        yield from _check_model("base_model", document["base_model"])
    yield from _check_tokenizer(document)
    given = [key for key in _INPUTS if document.get(key)]
    if len(given) != 1:
        yield Finding(
            level="error",
            what="a recipe must have exactly one of models, slices and modules; got "
            + (" and ".join(given) or "none of them, or an empty one"),
            remedy="List the models to merge under models:, each as - model: PATH.",
        )
    yield from _check_inputs(document, "")
    modules = document.get("modules")
    if modules is not None and not isinstance(modules, Mapping):
        yield _wrong("modules", "a mapping of module names", modules)
    for name, module in (modules if isinstance(modules, Mapping) else {}).items():
        if not isinstance(module, Mapping):
            yield _wrong(f"modules.{name}", "a mapping with models or slices", module)
            continue
        if bool(module.get("models")) == bool(module.get("slices")):
            got = "both" if module.get("models") else "neither"
            yield Finding(
                level="error",
                what=f"modules.{name} must have either models or slices; got {got}",
                remedy="Give the module one of them.",
            )
        yield from _check_inputs(module, f"modules.{name}.")
    for block in blocks_of(document):
        yield from _check_block(block)
    yield from check_roles(document)


def check_method(document: Mapping[str, Any]) -> Iterator[Finding]:
    """A merge method that mergekit does not have, or none."""
    name = document.get("merge_method")
    known = [method.spec.name for method in registered_methods()]
    if name is None:
        yield Finding(level="error", what="merge_method is missing", remedy="Add merge_method: ace, or another one.")
    elif not isinstance(name, str):
        yield _wrong("merge_method", "text", name)
    elif name not in known:
        yield Finding(
            level="error",
            what=f"merge_method must be one of mergekit's or of its plugins; got {name!r}",
            remedy=did_you_mean(name, known) or f"Known: {', '.join(sorted(known))}.",
        )


def _check_dtype(key: str, value: Any) -> Iterator[Finding]:
    if value is None:
        return
    near = _DTYPE_NAMES.get(str(value).lower().removeprefix("torch."))
    known = f"Known: {', '.join(_DTYPES)}."
    # Of their numbers alone the narrower ones are similar to these.
    nearest = "" if re.search(r"float[48]|int", str(value)) else did_you_mean(str(value), _DTYPES)
    remedy = f"Did you mean {near}?" if near else nearest or known
    try:
        dtype = dtype_from_name(value) if isinstance(value, str) else None
    except RuntimeError:
        dtype = None
    if dtype is None or not dtype.is_floating_point:
        yield Finding(level="error", what=f"{key} must be one of {', '.join(_DTYPES)}; got {value!r}", remedy=remedy)


def _check_chat_template(value: Any) -> Iterator[Finding]:
    if not value:
        if value not in (None, ""):
            yield _wrong("chat_template", "text", value)
        return
    if not isinstance(value, str):
        yield _wrong("chat_template", "text", value)
        return
    names = chat_template_names()
    # By the same rule mergekit tells a template from a name, after the merge.
    if value != "auto" and value not in names and (len(value) < _SHORTEST_TEMPLATE or "{" not in value):
        yield Finding(
            level="error",
            what=f"chat_template must be auto, a template of mergekit's, or a Jinja template; got {value!r}",
            remedy=did_you_mean(value, ["auto", *names]) or f"Known: auto, {', '.join(names)}.",
        )


def _check_tokenizer(document: Mapping[str, Any]) -> Iterator[Finding]:
    source, tokenizer = document.get("tokenizer_source"), document.get("tokenizer")
    if source and tokenizer:
        yield Finding(
            level="error",
            what="a recipe must have either tokenizer_source or tokenizer; got both",
            remedy="Keep tokenizer, with the source in it.",
        )
    if source is not None:
        yield from _check_source("tokenizer_source", source)
    if tokenizer is None:
        return
    if not isinstance(tokenizer, Mapping):
        yield _wrong("tokenizer", "a mapping with source", tokenizer)
        return
    if tokenizer.get("source") is not None:
        yield from _check_source("tokenizer.source", tokenizer["source"])
    yield from _check_tokens(tokenizer.get("tokens"), models_of(document))
    multiple = tokenizer.get("pad_to_multiple_of")
    if multiple is not None and (not isinstance(multiple, int) or isinstance(multiple, bool) or multiple < 1):
        yield _wrong("tokenizer.pad_to_multiple_of", "a whole number above 0", multiple)


def _check_tokens(tokens: Any, models: Collection[ModelReference]) -> Iterator[Finding]:
    if tokens is None:
        return
    if not isinstance(tokens, Mapping):
        yield _wrong("tokenizer.tokens", "a mapping from token to source", tokens)
        return
    for token, value in tokens.items():
        where = f"tokenizer.tokens: {token}"
        try:
            source = _token_source(value)
        except (ValueError, RuntimeError, TypeError, AttributeError):
            source = None
            yield Finding(
                level="error",
                what=f"{where} must be a mapping with source, and force if models that have the token are to take it "
                f"too; got {value!r}",
                remedy="Write {source: MODEL}, {source: {kind: zero}} or {source: {kind: model_token, model: MODEL, "
                "token: TOKEN}}.",
            )
        if not isinstance(token, str):
            yield _wrong(where, "text, in quotes", token)
        model = source.model if isinstance(source, ModelTokenEmbedding) else source
        if isinstance(model, ModelReference) and models and model not in models:
            yield Finding(
                level="error",
                what=f"{where} takes its row from {model}, which is no model of this recipe",
                remedy=f"Take it from one of {', '.join(map(str, models))}.",
            )


def _token_source(value: Any) -> Any:
    """Where a token's row comes from.

    Raises:
        ValueError, RuntimeError, TypeError, AttributeError: nowhere that mergekit knows.
    """
    source = value.get("source") if isinstance(value, Mapping) else None
    if isinstance(source, Mapping) and "kind" in source:  # or mergekit takes it for a model, and reads no token
        schema = ModelTokenEmbedding if source["kind"] == "model_token" else ZeroEmbedding
        schema.model_validate(source)
    return TokenEmbeddingConfig.model_validate(value).source


def _check_source(where: str, source: Any) -> Iterator[Finding]:
    if source in ("union", "base"):
        return
    if isinstance(source, str) and not Path(source).exists() and (near := did_you_mean(source, ["union", "base"])):
        surely = get_close_matches(source.lower(), ["union", "base"], cutoff=_SURELY)
        yield Finding(
            level="error" if surely else "warning",
            what=f"{where} is taken for a model named {source!r}",
            remedy=near,
        )
    yield from _check_model(where, source)


def _check_inputs(holder: Mapping[str, Any], prefix: str) -> Iterator[Finding]:
    models, slices = holder.get("models"), holder.get("slices")
    if models is not None and not isinstance(models, list):
        yield _wrong(f"{prefix}models", "a list, each entry with model", models)
    for index, entry in enumerate(models if isinstance(models, list) else []):
        where = f"{prefix}models[{index}]"
        if not isinstance(entry, Mapping):
            yield Finding(
                level="error",
                what=f"{where} must be a mapping with model; got {entry!r}",
                remedy=f"Write - model: {entry}." if isinstance(entry, str) else "Write - model: PATH.",
            )
        elif entry.get("model") is None:
            yield _missing(where, "model")
        else:
            yield from _check_model(f"{where}.model", entry["model"])
    if slices is not None and not isinstance(slices, list):
        yield _wrong(f"{prefix}slices", "a list, each entry with sources", slices)
    for index, part in enumerate(slices if isinstance(slices, list) else []):
        yield from _check_slice(f"{prefix}slices[{index}]", part)


def _check_slice(where: str, part: Any) -> Iterator[Finding]:
    if not isinstance(part, Mapping) or not isinstance(part.get("sources"), list) or not part["sources"]:
        yield _wrong(where, "a mapping with a list of sources", part)
        return
    lengths = set()
    for number, source in enumerate(part["sources"]):
        place = f"{where}.sources[{number}]"
        if not isinstance(source, Mapping):
            yield _wrong(place, "a mapping with model and layer_range", source)
            continue
        if source.get("model") is None:
            yield _missing(place, "model")
        else:
            yield from _check_model(f"{place}.model", source["model"])
        layers = source.get("layer_range")
        if layers is None:
            yield _missing(place, "layer_range")
        elif not _is_range(layers):
            yield _wrong(f"{place}.layer_range", "two numbers of layers, 0 <= first < end", layers)
        else:
            lengths.add(layers[1] - layers[0])
    if len(lengths) > 1:
        yield Finding(
            level="error",
            what=f"{where} must take as many layers of every model; got {' and '.join(map(str, sorted(lengths)))}",
            remedy="Give every source of a slice a layer_range of the same length.",
        )


def _is_range(layers: Any) -> bool:
    return (
        isinstance(layers, Sequence)
        and not isinstance(layers, str)
        and len(layers) == 2
        and all(isinstance(number, int) and not isinstance(number, bool) for number in layers)
        and 0 <= layers[0] < layers[1]
    )


def _check_model(where: str, value: Any) -> Iterator[Finding]:
    if isinstance(value, str) and any(sign in value for sign in "@+"):  # the check of paths takes those apart
        return
    try:
        ModelReference.model_validate(value)
    except (ValueError, RuntimeError, TypeError, AttributeError):
        yield Finding(
            level="error",
            what=f"{where} must be a path or a name of the Hugging Face Hub; got {value!r}",
            remedy="Write PATH, BASE+ADAPTER, or {model: {path: BASE}, lora: {path: ADAPTER}}.",
        )


def _check_block(block: Block) -> Iterator[Finding]:
    if block.values is None:
        return
    if not isinstance(block.values, Mapping):
        yield _wrong(block.where, "a mapping of parameters", block.values)
        return
    for name, setting in block.values.items():
        yield from _check_setting(f"{block.where}: {name}", setting)


def _check_setting(where: str, setting: Any) -> Iterator[Finding]:
    """A value, a gradient (a list of values), an entry with value and filter, or a list of those."""
    if setting == []:
        yield Finding(
            level="error",
            what=f"{where} is an empty list; mergekit takes the default without a message",
            remedy="Give it a value, or remove it.",
        )
        return
    if _is_scalar(setting) or (isinstance(setting, list) and all(_is_scalar(value) for value in setting)):
        return
    for entry in setting if isinstance(setting, list) else [setting]:
        if not isinstance(entry, Mapping):
            yield _wrong(where, "a value, a list of values, or entries with value and filter", entry)
            continue
        if "value" not in entry:
            yield _missing(where, "value", entry)
        elif not _is_scalar(entry["value"]) and not (
            isinstance(entry["value"], list) and all(_is_scalar(value) for value in entry["value"])
        ):
            yield _wrong(f"{where}.value", "a value or a list of values", entry["value"])
        if entry.get("filter") is not None and not isinstance(entry["filter"], str):
            yield _wrong(f"{where}.filter", "a part of a tensor's name", entry["filter"])
        for key in entry.keys() - {"value", "filter"}:
            yield Finding(
                level="error",
                what=f"mergekit does not read {key!r} in {where}",
                remedy=did_you_mean(str(key), ["value", "filter"]) or "It reads: value, filter.",
            )


def _is_scalar(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)


def _wrong(where: str, requirement: str, value: Any) -> Finding:
    return Finding(level="error", what=f"{where} must be {requirement}; got {value!r}", remedy="Correct the entry.")


def _missing(where: str, key: str, entry: Any = None) -> Finding:
    got = "" if entry is None else f"; got {entry!r}"
    return Finding(level="error", what=f"{where} must have {key}{got}", remedy=f"Add {key}.")
