"""The configurations of a recipe's models, where they differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mergekit.common import ModelReference
from mergekit.options import MergeOptions
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mergekit_ace.checkpoints.sources import read_json
from mergekit_ace.mergekit_internals import in_recipe_order
from mergekit_ace.recipe.findings import Finding
from mergekit_ace.recipe.reading import Recipe

# Configuration entries that make two models different functions of the same weights, or of none.
_SHAPES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
)
_MEANING = ("hidden_act", "tie_word_embeddings")
_OLDER = ("rope_theta", "rope_scaling")
_Entries = Mapping[str, Any]


def check_configurations(recipe: Recipe, options: MergeOptions) -> Iterator[Finding]:
    """Experts whose configuration is not the base's."""
    models = in_recipe_order(recipe.config)
    configurations = {model: _configuration(model) for model in models}
    base = models[0]
    for expert in models[1:]:
        ours, theirs = configurations[base], configurations[expert]
        if ours is None or theirs is None:
            continue
        if ours.get("architectures") != theirs.get("architectures"):
            if options.allow_crimes:
                yield _by_chance(expert, ours, theirs)
            else:
                yield Finding(
                    level="error",
                    what=f"{expert} must be of the base's architecture {_named(ours)}; got {_named(theirs)}",
                    remedy="Merge models of one architecture.",
                )
            continue
        shapes = _SHAPES if recipe.config.models else ()
        for key in shapes:
            if ours.get(key) != theirs.get(key):
                yield Finding(
                    level="error",
                    what=f"{expert} must have the base's {key} {ours.get(key)}; got {theirs.get(key)}",
                    remedy="Merge fine-tunes of one base model.",
                )
        meant, others = _meaning(ours), _meaning(theirs)
        for key in dict.fromkeys([*meant, *others]):
            if meant.get(key) != others.get(key):
                yield Finding(
                    level="warning",
                    what=f"{expert} has {key} {others.get(key)} where the base has {meant.get(key)}: the merged model "
                    "keeps the base's",
                    remedy="Make sure that the expert is a fine-tune of this base.",
                )


def _meaning(configuration: _Entries) -> _Entries:
    """Rotary positions and the entries of `_MEANING`, as transformers understands them.

    Versions of transformers write the same settings differently (`rope_theta` and `rope_scaling` before 5,
    `rope_parameters` since), and leave out what is their default.
    """
    try:
        understood = CONFIG_MAPPING[configuration["model_type"]].from_dict(dict(configuration)).to_dict()
    except Exception:  # each kind of configuration has checks of its own; a model of unknown type is none to us
        understood = dict(configuration)
    rope = understood.get("rope_parameters")
    found: dict[str, Any] = {f"rope_parameters.{key}": value for key, value in (rope or {}).items() if key != "type"}
    for key in _MEANING if rope else (*_OLDER, *_MEANING):
        value = understood.get(key, configuration.get(key))
        if value is not None:
            found[key] = value
    return found


def _by_chance(expert: ModelReference, ours: _Entries, theirs: _Entries) -> Finding:
    return Finding(
        level="warning",
        what=f"--allow-crimes: {expert} is a {_named(theirs)} and the base a {_named(ours)}: mergekit-yaml takes the "
        "architecture of one of them by chance, another in every run; mergekit-ace merge takes the base's",
        remedy=f"Choose one: {{model: {{path: {expert.model.path}}}, override_architecture: {_named(ours)}}} as the "
        "expert's model.",
    )


def _named(configuration: _Entries) -> str:
    return ", ".join(configuration.get("architectures") or ["without a name"])


def _configuration(model: ModelReference) -> _Entries | None:
    configuration = read_json(model.model, "config.json")
    if configuration is None or model.override_architecture is None:
        return configuration
    return {**configuration, "architectures": [model.override_architecture]}
