"""Whether an adapter does anything to its base: what peft would load of it, and whether that is an update.

peft ignores keys that fit no module of the base, and an update of zeros, without a message: the "expert" is then its
base.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from mergekit.common import ModelReference, get_auto_cls
from mergekit.options import MergeOptions
from peft.utils.save_and_load import set_peft_model_state_dict
from safetensors import safe_open

from mergekit_ace.checkpoints.headers import TensorHeader, read_file
from mergekit_ace.factors.formats.peft_settings import lost_start
from mergekit_ace.recipe.failures import READING
from mergekit_ace.recipe.findings import Finding

_MOST_NAMES = 3
_NOT_MERGED = ("ADAPTION_PROMPT",)
_SIZES = re.compile(
    r"size mismatch for (\S+): copying a param with shape \S*?\((.*?)\).*?current model is \S*?\((.*?)\)"
)
# The factor of a low-rank update that starts at zero.
_STARTS_AT_ZERO = re.compile(r"lora_(?:embedding_)?B(?:\.|$)")
_PAIR = re.compile(r"lora_(?:embedding_)?([AB])(?:\.|$)")
_OTHER = {"A": "B", "B": "A"}
_FACTOR = re.compile(r"lora_|\.vera_|\.hada_|\.lokr_|\.oft_|\.boft_|ia3_")
_TABLE = re.compile(r"embed|lm_head|wte|wpe|shared")


def check_fit(model: ModelReference, options: MergeOptions) -> Iterator[Finding]:
    """What is wrong with `base+adapter`, whose files are whole and on this disk; reads the adapter, not the base."""
    if model.lora is None:
        return
    folder = Path(model.lora.path)
    file = next(
        (folder / name for name in ("adapter_model.safetensors", "adapter_model.bin") if (folder / name).is_file()),
        None,
    )
    if file is None or not (folder / "adapter_config.json").is_file() or not Path(model.model.path).is_dir():
        return
    try:
        headers = read_file(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of settings that it does not know, which are a finding of their own
            config = peft.PeftConfig.from_pretrained(str(folder))
    except READING:  # reported by the checks of files
        return
    if config.is_prompt_learning or str(getattr(config.peft_type, "value", config.peft_type)) in _NOT_MERGED:
        yield Finding(
            level="error",
            what=f"the adapter {folder} of {model} is of the kind {config.peft_type}, which is no change of weights",
            remedy="Only adapters that peft can merge into their base can be merged: LoRA and its kin.",
        )
        return
    if not headers:
        yield Finding(
            level="error", what=f"the adapter {folder} of {model} holds no tensor", remedy="Train it, or save it again."
        )
        return
    if (start := lost_start(config.to_dict())) is not None:
        yield Finding(
            level="error",
            what=f"the adapter {folder} of {model} was started by init_lora_weights: {start}, which changed the base's "
            "weights too; peft does not find that change again when it loads the adapter, and another update is merged",
            remedy="Save it again with path_initial_model_for_weight_conversion, which makes it a plain LoRA."
            if start != "loftq"
            else "Merge it into the quantized model that it was trained on (peft's merge_and_unload), and list that.",
        )
        return
    halves = _halves(headers)
    if halves:
        yield Finding(
            level="error",
            what=f"the adapter {folder} of {model} must hold both factors of an update; {_some(halves)} has one alone, "
            "and peft leaves the other as it starts",
            remedy="Copy or save the adapter again: its file is not whole.",
        )
        return
    idle = _idle(file, headers, config)
    if idle is not None:
        yield Finding(
            level="error",
            what=f"the adapter {folder} of {model} does nothing: {idle}",
            remedy="Check that it was trained, and saved after its training.",
        )
    yield from _check_keys(model, folder, headers, config, options)


def _idle(file: Path, headers: Mapping[str, TensorHeader], config: peft.PeftConfig) -> str | None:
    """Why an adapter of which peft loads everything leaves its base as it is; None where it does not."""
    factors = [name for name in headers if _STARTS_AT_ZERO.search(name)]
    others = [name for name in headers if not _FACTOR.search(name)]
    if not factors or others:  # of another kind, or with tensors that replace those of the base
        return None
    if getattr(config, "lora_alpha", None) == 0 and not getattr(config, "alpha_pattern", None):
        return "its lora_alpha is 0"
    if all(not bool(tensor.any()) for tensor in _tensors(file, factors)):
        return f"all {len(factors)} of its matrices B are 0, as before the first step of training"
    return None


def _halves(headers: Mapping[str, TensorHeader]) -> list[str]:
    """Factors of low-rank updates whose counterpart is not there; the bias that `lora_bias` puts on B has none."""
    return [
        name
        for name in headers
        if (found := _PAIR.search(name))
        and not name.endswith(".bias")
        and f"{name[: found.start(1)]}{_OTHER[found[1]]}{name[found.end(1) :]}" not in headers
    ]


def _tensors(file: Path, names: Sequence[str]) -> Iterator[torch.Tensor]:
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as stored:
            for name in names:
                yield stored.get_tensor(name)
    else:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
        yield from (tensors[name] for name in names)


def _check_keys(
    model: ModelReference,
    folder: Path,
    headers: Mapping[str, TensorHeader],
    config: peft.PeftConfig,
    options: MergeOptions,
) -> Iterator[Finding]:
    try:
        skeleton = _skeleton(model, options)
    except Exception:  # a configuration that transformers cannot build: peft will not either, and reports why
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = peft.get_peft_model(skeleton, _plainly_started(config))
    except ValueError as error:
        if "arget modules" not in str(error) and "target_parameters" not in str(error):
            raise
        targets = getattr(config, "target_modules", None)
        yield Finding(
            level="error",
            what=f"the adapter {folder} of {model} does nothing: no module of {model.model} matches its target_modules "
            f"{_targets(targets)}",
            remedy="Put it on the model that it was trained on.",
        )
        return
    expected = _saved_names(adapted)
    ignored, missing, sizes = _load(adapted, headers)
    yield from _ignored(model, folder, headers, ignored, expected)
    lacking = sorted(name for name in expected & missing if _PAIR.search(name))
    if lacking and not ignored:
        yield Finding(
            level="warning",
            what=f"the adapter {folder} of {model} lacks {len(lacking)} of the {len(expected)} tensors that its "
            f"configuration names: {_some(lacking)}; peft leaves those modules as in the base",
            remedy="Nothing to do, if it was trained on the others alone; else copy it again.",
        )
    yield from _sizes(model, folder, sizes)


def _skeleton(model: ModelReference, options: MergeOptions) -> Any:
    """The base's modules without its weights."""
    config = ModelReference(model=model.model).config(trust_remote_code=options.trust_remote_code)
    (architecture,) = config.architectures or [""]
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_auto_cls(architecture).from_config(config, trust_remote_code=options.trust_remote_code)


def _plainly_started(config: peft.PeftConfig) -> peft.PeftConfig:
    """A configuration whose adapters start from no decomposition of the base, which has no weights here."""
    plain: Any = config
    if hasattr(plain, "init_lora_weights"):
        plain.init_lora_weights = False
    config.inference_mode = True
    return config


def _load(adapted: Any, headers: Mapping[str, TensorHeader]) -> tuple[list[str], set[str], list[tuple[str, str, str]]]:
    """What peft passes over, what it does not find, and names and shapes (adapter's, base's) of what it refuses."""
    state = {name: torch.empty(header.shape, dtype=header.dtype, device="meta") for name, header in headers.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result: Any = set_peft_model_state_dict(adapted, state, low_cpu_mem_usage=True)
        except KeyError as error:  # a module that was to be saved whole, and was not
            return [str(error).strip("'")], set(), []
        except RuntimeError as error:
            found = _SIZES.findall(str(error))
            if not found:
                raise
            return (
                [],
                set(),
                [(name.replace(".default", ""), theirs.strip("[]"), ours.strip("[]")) for name, theirs, ours in found],
            )
    ignored, missing = ([_without_name(key) for key in keys] for keys in (result.unexpected_keys, result.missing_keys))
    return ignored, set(missing), []


def _without_name(key: str) -> str:
    return key.replace(".default", "")


def _saved_names(adapted: Any) -> set[str]:
    """The keys that an adapter of this kind has for this base."""
    return {_without_name(name) for name, _ in adapted.named_parameters() if ".default" in name}


def _ignored(
    model: ModelReference, folder: Path, headers: Mapping[str, TensorHeader], ignored: Sequence[str], expected: set[str]
) -> Iterator[Finding]:
    if not ignored:
        return
    everything = len(ignored) >= len(headers)
    yield Finding(
        level="error" if everything else "warning",
        what=f"the adapter {folder} of {model} "
        + (
            "does nothing"
            if everything
            else f"does less than it holds: {len(ignored)} of its {len(headers)} tensors are ignored"
        )
        + f": no module of {model.model} matches {_some(ignored)}",
        remedy=_other_prefix(ignored, expected) or "Put it on the model that it was trained on.",
    )


def _other_prefix(keys: Iterable[str], expected: set[str]) -> str | None:
    """The beginning that would make most keys match, in words."""
    by_tail: dict[str, set[str]] = {}
    for name in expected:
        parts = name.split(".")
        for start in range(len(parts)):
            by_tail.setdefault(".".join(parts[start:]), set()).add(".".join(parts[:start]))
    found: Counter[tuple[str, str]] = Counter()
    for key in keys:
        parts = key.split(".")
        for start in range(len(parts) - 2):
            beginnings = by_tail.get(".".join(parts[start:]))
            if beginnings and len(beginnings) == 1:
                found[(".".join(parts[:start]), next(iter(beginnings)))] += 1
                break
    if not found:
        return None
    (theirs, ours), count = found.most_common(1)[0]
    return (
        f"{count} of its keys would match if they began with {ours + '.'}"
        + (f" in place of {theirs + '.'}" if theirs else "")
        + ": rename them, or put it on the model that it was trained on."
    )


def _sizes(model: ModelReference, folder: Path, sizes: Sequence[tuple[str, str, str]]) -> Iterator[Finding]:
    tables = [size for size in sizes if _TABLE.search(size[0])]
    if tables:
        name, theirs, ours = tables[0]
        rows = theirs.split(",")[0]
        yield Finding(
            level="error",
            what=f"the adapter {folder} of {model} was trained after its base's vocabulary was resized: {name} is "
            f"({theirs}) for ({ours}) in {model.model}",
            remedy=f"Resize the base first: load it, model.resize_token_embeddings({rows}), save_pretrained(FOLDER), "
            f"with the adapter's tokenizer, and write FOLDER+{folder}.",
        )
    elif sizes:
        name, theirs, ours = sizes[0]
        yield Finding(
            level="error",
            what=f"the adapter {folder} of {model} was trained on a model of another size: {name} is ({theirs}) for "
            f"({ours}), and {len(sizes) - 1} more",
            remedy="Put it on the model that it was trained on.",
        )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _targets(targets: object) -> str:
    return ", ".join(sorted(map(str, targets))) if isinstance(targets, set | list) else repr(targets)
