"""What must hold before a merge or an inspection starts, found without reading a weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from mergekit.options import MergeOptions

from mergekit_ace.checks.adapter_fit import check_fit
from mergekit_ace.checks.devices import require_device
from mergekit_ace.checks.files import check_files
from mergekit_ace.checks.quantized import check_quantization
from mergekit_ace.checks.spelling import check_keys, check_parameters
from mergekit_ace.recipe.failures import RecipeError
from mergekit_ace.recipe.findings import Finding
from mergekit_ace.recipe.paths import check_paths
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
    findings = [*_ignored(recipe), *_of_files(recipe)]
    if not any(finding.level == "error" for finding in findings):
        findings += [finding for model in recipe.config.referenced_models() for finding in check_fit(model, options)]
    stopping = ("error", "warning") if strict else ("error",)
    errors = [f"{finding.what}. {finding.remedy}" for finding in findings if finding.level in stopping]
    if errors:
        raise RecipeError("\n".join(errors))
    return [finding for finding in findings if finding.level == "warning"]


def _of_files(recipe: Recipe) -> Iterator[Finding]:
    yield from check_paths(recipe.document)
    yield from check_files(recipe)
    yield from check_quantization(recipe)


def _ignored(recipe: Recipe) -> Iterator[Finding]:
    """What mergekit does not read, which it merges without: errors of a check, warnings of a merge."""
    for finding in (*check_keys(recipe.document), *check_parameters(recipe.document)):
        yield replace(finding, level="warning")
