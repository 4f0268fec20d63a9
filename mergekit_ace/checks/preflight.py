"""What must hold before a merge or an inspection starts, found without reading a weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from mergekit.options import MergeOptions

from mergekit_ace.checks.adapter_fit import check_fit
from mergekit_ace.checks.buffers import check_buffers
from mergekit_ace.checks.configurations import check_configurations
from mergekit_ace.checks.devices import require_device
from mergekit_ace.checks.duplicates import check_duplicates
from mergekit_ace.checks.files import check_files
from mergekit_ace.checks.layers import check_layers
from mergekit_ace.checks.quantized import check_quantization
from mergekit_ace.checks.spelling import check_keys, check_parameters
from mergekit_ace.checks.tensors import check_names, check_tensors
from mergekit_ace.checks.token_rows import check_token_rows
from mergekit_ace.checks.weights import check_weights
from mergekit_ace.recipe.failures import RecipeError
from mergekit_ace.recipe.findings import Finding
from mergekit_ace.recipe.paths import check_paths
from mergekit_ace.recipe.plan import Plan
from mergekit_ace.recipe.reading import Recipe


def require_sound_inputs(recipe: Recipe, options: MergeOptions, *, strict: bool = False) -> Sequence[Finding]:
    """Stop where the merge would fail half-way or merge other numbers than the recipe asks for.

    Args:
        recipe: what will be merged.
        options: of the command.
        strict: stop for warnings too.

    Returns:
        The warnings.

    Raises:
        RecipeError: with everything that stops it, one line each.
    """
    require_device(options)
    findings = [*check_unread(recipe), *_of_files(recipe, options)]
    if not any(finding.level == "error" for finding in findings):
        findings += [finding for model in recipe.config.referenced_models() for finding in check_fit(model, options)]
    stopping = ("error", "warning") if strict else ("error",)
    errors = [f"{finding.what}. {finding.remedy}" for finding in findings if finding.level in stopping]
    if errors:
        raise RecipeError("\n".join(errors))
    return [finding for finding in findings if finding.level == "warning"]


def require_sound_plan(plan: Plan, *, complete: bool = True) -> None:
    """Stop where the merge would fail at a tensor, by the headers of the models.

    Args:
        plan: of the recipe.
        complete: stop for single tensors too; without it, only for what is wrong with all of a model.

    Raises:
        RecipeError: with everything that stops it, one line each.
    """
    findings = [*check_layers(plan), *check_weights(plan)]
    if not findings:
        findings = (
            [*check_tensors(plan), *check_buffers(plan), *check_token_rows(plan)] if complete else [*check_names(plan)]
        )
    errors = [f"{finding.what}. {finding.remedy}" for finding in findings if finding.level == "error"]
    if errors:
        raise RecipeError("\n".join(errors))


def check_unread(recipe: Recipe) -> Iterator[Finding]:
    """What mergekit does not read, and merges without: errors of a check, warnings of a merge."""
    for finding in (*check_duplicates(recipe.text), *check_keys(recipe.document), *check_parameters(recipe.document)):
        yield replace(finding, level="warning")


def _of_files(recipe: Recipe, options: MergeOptions) -> Iterator[Finding]:
    yield from check_paths(recipe.document)
    yield from check_files(recipe)
    yield from check_quantization(recipe)
    for finding in check_configurations(recipe, options):
        if finding.level == "error":
            yield finding
