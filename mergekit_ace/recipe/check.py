"""A recipe examined before its merge."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mergekit.options import MergeOptions

from mergekit_ace.recipe.adapters import check_adapters
from mergekit_ace.recipe.configurations import check_configurations
from mergekit_ace.recipe.cost import Cost, check_cost, estimate
from mergekit_ace.recipe.failures import RecipeError
from mergekit_ace.recipe.files import check_files
from mergekit_ace.recipe.findings import Finding, by_severity
from mergekit_ace.recipe.kinship import check_kinship
from mergekit_ace.recipe.paths import check_paths
from mergekit_ace.recipe.plan import Plan, Recipe, planned, read_recipe
from mergekit_ace.recipe.quantized import check_quantization
from mergekit_ace.recipe.spelling import check_filters, check_keys, check_method, check_parameters
from mergekit_ace.recipe.tensors import check_precision, check_tensors, check_treatments
from mergekit_ace.recipe.unused import check_unused
from mergekit_ace.recipe.vocabularies import check_tokenizers


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
    """Find what mergekit would pass over in silence, or stop at late; writes nothing and merges no adapter.

    Reads headers, configurations and tokenizers, and a few matrices of every expert.

    Args:
        file: the recipe.
        options: of `mergekit-yaml`; its defaults when None.
    """
    options = options or MergeOptions()
    try:
        recipe = read_recipe(file)
    except RecipeError as error:
        return Examination(findings=(_unplannable(error),), cost=None)
    findings = [*check_keys(recipe.document), *check_parameters(recipe.config), *check_tokenizers(recipe)]
    obstacles = list(_obstacles(recipe, options))
    findings += obstacles
    if any(finding.level == "error" for finding in obstacles):
        return Examination(findings=by_severity(findings), cost=None)
    try:
        with planned(recipe, options, adapters_unmerged=True) as plan:
            findings += _of_plan(plan)
            cost = estimate(plan)
    except RecipeError as error:
        return Examination(findings=by_severity([*findings, _unplannable(error)]), cost=None)
    return Examination(findings=by_severity([*findings, *check_cost(cost)]), cost=cost)


def _obstacles(recipe: Recipe, options: MergeOptions) -> Iterator[Finding]:
    """What keeps mergekit from planning the merge, said better than it says it."""
    yield from check_method(recipe.config.merge_method)
    yield from check_paths(recipe.document)
    yield from check_files(recipe)
    yield from check_quantization(recipe)
    yield from check_adapters(recipe, options)
    yield from check_configurations(recipe, options)


def _of_plan(plan: Plan) -> Iterator[Finding]:
    yield from check_filters(plan)
    yield from check_tensors(plan)
    yield from check_unused(plan)
    yield from check_precision(plan)
    yield from check_treatments(plan)
    yield from check_kinship(plan)


def _unplannable(error: RecipeError) -> Finding:
    return Finding(level="error", what=str(error), remedy="mergekit-yaml would stop at the same place.")
