"""A recipe examined before its merge."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit.options import MergeOptions

from mergekit_ace.checkpoints.hub import hub_model
from mergekit_ace.checkpoints.sources import is_local, is_on_hub
from mergekit_ace.checks.adapters import check_adapters
from mergekit_ace.checks.buffers import check_buffers
from mergekit_ace.checks.configurations import check_configurations
from mergekit_ace.checks.cost import Cost, check_cost, estimate
from mergekit_ace.checks.devices import check_device
from mergekit_ace.checks.duplicates import check_duplicates
from mergekit_ace.checks.files import check_files
from mergekit_ace.checks.filters import check_filters
from mergekit_ace.checks.finite import check_finite
from mergekit_ace.checks.kinship import check_kinship
from mergekit_ace.checks.layers import check_layers
from mergekit_ace.checks.moments import check_moments
from mergekit_ace.checks.moments_hint import suggest_moments
from mergekit_ace.checks.quantized import check_quantization
from mergekit_ace.checks.raw_recipes import check_raw, is_raw
from mergekit_ace.checks.spelling import check_keys, check_parameters
from mergekit_ace.checks.tensors import check_precision, check_tensors, check_treatments
from mergekit_ace.checks.token_rows import check_token_rows
from mergekit_ace.checks.unused import check_unused
from mergekit_ace.checks.vocabularies import (
    check_chat_template,
    check_ends,
    check_missing_tokenizers,
    check_padding,
    check_tokenizers,
)
from mergekit_ace.checks.weights import check_weights
from mergekit_ace.mergekit_internals import architecture_is_inferred, in_recipe_order
from mergekit_ace.methods.layerwise import LayerwiseMethod
from mergekit_ace.recipe.failures import RecipeError
from mergekit_ace.recipe.findings import Finding, by_severity
from mergekit_ace.recipe.parameter_values import check_parameter_values
from mergekit_ace.recipe.paths import check_paths
from mergekit_ace.recipe.plan import Plan
from mergekit_ace.recipe.planning import planned
from mergekit_ace.recipe.reading import Recipe, parse_document, read_text, understood
from mergekit_ace.recipe.values import check_method, check_values

_UNDEFINED = Finding(
    level="hint",
    what="mergekit has no definition of the models' architecture: it infers it from the tensors, for which it "
    "downloads them, so they were not checked",
    remedy="Check again once the models are on this disk.",
)


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What was found, and what the merge will take."""

    findings: tuple[Finding, ...]
    """Errors first."""
    cost: Cost | None
    """None where errors keep the merge from being planned."""

    @property
    def errors(self) -> int:
        """How many findings are errors."""
        return sum(finding.level == "error" for finding in self.findings)

    @property
    def warnings(self) -> int:
        """How many findings are warnings."""
        return sum(finding.level == "warning" for finding in self.findings)


def check_recipe(file: Path, options: MergeOptions | None = None) -> Examination:
    """Find what mergekit would ignore without a message, or stop at late; writes nothing and merges no adapter.

    The recipe itself is checked first: while it has errors, nothing is asked of the Hugging Face Hub. Then come
    headers, configurations and tokenizers, and a few matrices of every expert.

    Args:
        file: the recipe.
        options: of `mergekit-yaml`; its defaults when None.
    """
    # Nothing is computed on a device here, and the machine of the merge may be another one.
    options = (options or MergeOptions()).model_copy(update={"read_to_gpu": False})
    try:
        text = read_text(file)
        document = parse_document(text, file)
    except RecipeError as error:
        return Examination(findings=(_unplannable(error),), cost=None)
    stopping = [*check_duplicates(text), *_stopping(document)]
    if is_raw(document):
        findings = [*stopping, *check_parameters(document), *check_raw(document)]
        return Examination(findings=by_severity(findings), cost=None)
    findings = [*stopping, *check_keys(document), *check_parameters(document)]
    try:
        recipe = understood(text, document, file)
    except RecipeError as error:
        if not _errors(stopping):
            findings.append(_unplannable(error))
        return Examination(findings=by_severity(findings), cost=None)
    if _errors(findings) and not _is_local(recipe):
        return Examination(findings=by_severity(findings), cost=None)
    obstacles = list(_of_files(recipe, options))
    findings += obstacles
    if _errors([*stopping, *obstacles]):
        return Examination(findings=by_severity(findings), cost=None)
    on_hub = [model for model in in_recipe_order(recipe.config) if is_on_hub(model.model)]
    if any(hub_model(model.model).state != "read" for model in on_hub):
        return Examination(findings=by_severity(findings), cost=None)
    if on_hub and architecture_is_inferred(recipe.config, options):
        findings.append(_UNDEFINED)
        return Examination(findings=by_severity(findings), cost=None)
    try:
        with planned(recipe, options, headers_only=True) as plan:
            findings += _of_plan(plan)
            findings += _suggestions(file, plan)
            cost = estimate(plan)
    except RecipeError as error:
        return Examination(findings=by_severity([*findings, _unplannable(error)]), cost=None)
    return Examination(findings=by_severity([*findings, *check_cost(cost)]), cost=cost)


def _stopping(document: Mapping[str, Any]) -> Iterator[Finding]:
    """What in the recipe itself would stop the merge."""
    yield from check_method(document)
    yield from check_values(document)
    yield from check_parameter_values(document)
    if not is_raw(document):  # mergekit-pytorch takes a file's name as it is
        yield from check_paths(document)


def _of_files(recipe: Recipe, options: MergeOptions) -> Iterator[Finding]:
    """What can be found in the models' files without their weights; mergekit reports it later or less clearly."""
    yield from check_files(recipe)
    yield from check_quantization(recipe)
    yield from check_adapters(recipe, options)
    yield from check_configurations(recipe, options)
    yield from check_missing_tokenizers(recipe)
    yield from check_tokenizers(recipe)
    yield from check_chat_template(recipe)
    yield from check_ends(recipe)
    yield from check_device(options)


def _of_plan(plan: Plan) -> Iterator[Finding]:
    yield from check_filters(plan)
    yield from check_weights(plan)
    layers = list(check_layers(plan))
    yield from layers
    if not layers:  # or each tensor of a layer beyond the end would be a finding of its own
        yield from check_tensors(plan)
        yield from check_unused(plan)
    yield from check_buffers(plan)
    yield from check_padding(plan)
    yield from check_token_rows(plan)
    yield from check_precision(plan)
    yield from check_treatments(plan)
    yield from check_finite(plan)
    yield from check_kinship(plan)
    yield from check_moments(plan)


def _suggestions(file: Path, plan: Plan) -> Iterator[Finding]:
    if isinstance(plan.method, LayerwiseMethod):
        parameters = (tensor.shared_parameters for tensor in plan.tensors)
        yield from suggest_moments(file, plan.recipe.config, plan.method, parameters)


def _errors(findings: list[Finding]) -> bool:
    return any(finding.level == "error" for finding in findings)


def _is_local(recipe: Recipe) -> bool:
    return all(is_local(model.model) for model in in_recipe_order(recipe.config))


def _unplannable(error: RecipeError) -> Finding:
    return Finding(level="error", what=str(error), remedy="mergekit-yaml would stop at the same place.")
