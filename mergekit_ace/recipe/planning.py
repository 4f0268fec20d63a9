"""Planning a recipe: its models are found and opened, and closed at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mergekit.common import ModelReference
from mergekit.options import MergeOptions

from mergekit_ace.checkpoints.hub import hub_model
from mergekit_ace.checkpoints.sources import is_on_hub
from mergekit_ace.mergekit_internals import LoaderCache, require_known_mergekit
from mergekit_ace.recipe.adapter_cache import merged_adapter
from mergekit_ace.recipe.failures import RecipeError, message_of
from mergekit_ace.recipe.open_checkpoints import open_checkpoints
from mergekit_ace.recipe.plan import Plan
from mergekit_ace.recipe.reading import Recipe


@contextmanager
def planned(
    recipe: Recipe, options: MergeOptions, *, adapters_unmerged: bool = False, headers_only: bool = False
) -> Iterator[Plan]:
    """Plan a recipe; its files are open until the end of the `with` block.

    Args:
        recipe: what to plan.
        options: of `mergekit-yaml`.
        adapters_unmerged: let each LoRA expert stand for its base model, so that nothing is merged or written: enough
            for names and shapes.
        headers_only: that, and no weight is downloaded: the tensors of models on the Hugging Face Hub are known by name
            and shape, and cannot be read.

    Raises:
        RecipeError: when mergekit cannot plan it.
    """
    require_known_mergekit()
    with open_checkpoints(options) as loaders:
        try:
            for model in recipe.config.referenced_models():
                if headers_only and is_on_hub(model.model):
                    loaders.loaders[model] = hub_model(model.model).loader(model.model)
                elif model.lora is not None:
                    plain = ModelReference(model=model.model)
                    stored = plain if adapters_unmerged or headers_only else merged_adapter(model, options)
                    loaders.loaders[model] = stored.lazy_loader(options.transformers_cache, options.lazy_unpickle)
                _open(loaders, model)
            plan = Plan(recipe, options, loaders, headers_only=headers_only)
        except Exception as error:  # mergekit, transformers, safetensors and torch each raise their own
            raise RecipeError(f"{recipe.name}: mergekit cannot plan this merge; {message_of(error)}") from error
        yield plan


def _open(loaders: LoaderCache, model: ModelReference) -> None:
    """Have mergekit find a model's files, which it fetches where they are not on this disk."""
    try:
        loaders.get(model)
    except Exception as error:  # of the network, of its libraries, of a hub that is down
        if not is_on_hub(model.model):
            raise
        raise RuntimeError(
            f"{model.model} is no folder on this disk, and fetching it from the Hugging Face Hub failed; "
            f"{message_of(error)}. Check its path or name, and the network"
        ) from error
