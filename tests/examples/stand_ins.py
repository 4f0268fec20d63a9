"""Small local models in the place of the hub's."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

RECIPES = Path(__file__).parents[2] / "examples" / "yaml"


def localized(name: str, models: Mapping[str, Path], parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A recipe's documents with every model they name replaced by a local path.

    Args:
        name: file name in examples/yaml, without its ending.
        models: local path for each name in the recipe; a name that is not there is an error.
        parameters: set in the first document unless it sets them itself, so that the result is the reference's whatever
            the defaults are.
    """
    text = (RECIPES / f"{name}.yml").read_text()
    for model in models:
        assert model in text, f"{name}.yml does not name {model}"
    # Longest first, as one name may begin another.
    names = "|".join(re.escape(model) for model in sorted(models, key=len, reverse=True))
    documents = list(yaml.safe_load_all(re.sub(names, lambda found: str(models[found.group()]), text)))
    documents[0]["parameters"] = {**parameters, **documents[0].get("parameters", {})}
    return documents
