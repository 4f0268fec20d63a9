"""A recipe file: its YAML, and what mergekit understands of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from mergekit.config import MergeConfiguration
from yaml.composer import ComposerError

from mergekit_ace import register
from mergekit_ace.mergekit_internals import OrderedRecipe
from mergekit_ace.recipe.failures import RecipeError, message_of
from mergekit_ace.recipe.parameter_values import check_parameter_values
from mergekit_ace.recipe.paths import check_paths
from mergekit_ace.recipe.values import check_method, check_values


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe as it stands in its file."""

    name: str
    """How messages call it."""
    text: str
    """As it was written."""
    document: Mapping[str, Any]
    """The YAML, as parsed."""
    config: MergeConfiguration
    """What mergekit understands of it."""


def read_recipe(path: Path) -> Recipe:
    """Read a recipe file.

    Raises:
        RecipeError: it cannot be read, is not YAML, or mergekit does not accept it; with everything that is wrong.
    """
    return parse_recipe(read_text(path), path)


def parse_recipe(text: str, path: Path) -> Recipe:
    """Read the text of a recipe file.

    Raises:
        RecipeError: as `read_recipe`.
    """
    document = parse_document(text, path)
    findings = [
        *check_method(document),
        *check_values(document),
        *check_parameter_values(document),
        *check_paths(document),
    ]
    errors = [f"{finding.what}. {finding.remedy}" for finding in findings if finding.level == "error"]
    if errors:
        raise RecipeError("\n".join([f"{path}: {errors[0]}", *errors[1:]]))
    return understood(text, document, path)


def read_text(path: Path) -> str:
    """A file's text.

    Raises:
        RecipeError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} must be a YAML file; {message_of(error)}") from error


def parse_document(text: str, path: Path) -> Mapping[str, Any]:
    """A recipe's YAML.

    Raises:
        RecipeError: it is none, or holds no mapping.
    """
    register()  # a no-op where the startup hook has run
    try:
        document = yaml.safe_load(text)
    except ComposerError as error:
        if _holds_several(text):
            raise RecipeError(
                f"{path} must hold one recipe; it holds several documents, with --- between them. Run mergekit-multi, "
                "which merges them one after the other, or give each a file of its own"
            ) from error
        raise RecipeError(f"{path} must be a YAML file; {message_of(error)}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} must be a YAML file; {message_of(error)}") from error
    if not isinstance(document, Mapping):
        found = "it is empty" if document is None else f"got {type(document).__name__}"
        raise RecipeError(f"{path} must hold a mapping with merge_method and models; {found}")
    return document


def _holds_several(text: str) -> bool:
    events = yaml.parse(text, Loader=yaml.SafeLoader)
    return sum(isinstance(event, yaml.DocumentStartEvent) for event in events) > 1


def understood(text: str, document: Mapping[str, Any], path: Path) -> Recipe:
    """What mergekit makes of a recipe's document.

    Raises:
        RecipeError: mergekit does not accept it.
    """
    try:
        config = OrderedRecipe.model_validate(document)
    except (ValueError, RuntimeError) as error:
        raise RecipeError(f"{path}: mergekit does not accept this recipe; {message_of(error)}") from error
    return Recipe(name=str(path), text=text, document=document, config=config)
