"""A recipe's `moments` held against its adapters before the merge, without reading the moments."""

from __future__ import annotations

from collections.abc import Iterator

from mergekit_ace.adapters.merge import AdapterMerge
from mergekit_ace.adapters.request import Request, model_name
from mergekit_ace.checks.moments import estimated, estimates_only, sampled, unusable
from mergekit_ace.factors.model import Place
from mergekit_ace.methods.tensors.measured_moments import moments_for_adapters
from mergekit_ace.moments.index import MomentsError
from mergekit_ace.moments.load import MomentsFolder
from mergekit_ace.recipe.findings import Finding


def check_moments(request: Request, merge: AdapterMerge) -> Iterator[Finding]:
    """Moments that are not there, or of other models; adapters and matrices that keep their estimates."""
    asking = [place for place in request.places.values() if _asks(request, merge, place)]
    refused = [place for place in asking if not request.method.takes_moments(request.parameters(place.weight))]
    if refused:
        yield estimates_only(refused[0].weight)
        return
    try:
        yield from _of_places(request, merge, asking)
    except MomentsError as error:
        yield unusable(error)


def _asks(request: Request, merge: AdapterMerge, place: Place) -> bool:
    parameters = request.parameters(place.weight)
    return bool(parameters.get("moments")) and merge.treat(place, parameters).kind in ("matrix", "stack")


def _of_places(request: Request, merge: AdapterMerge, asking: list[Place]) -> Iterator[Finding]:
    warned: dict[str, str] = {}

    def warn(cause: str, message: str) -> None:
        warned.setdefault(cause, message)

    measured: list[tuple[Place, MomentsFolder]] = []
    for place in asking:
        parameters = request.parameters(place.weight)
        having = request.having(place, parameters["weight"])
        found = moments_for_adapters(place.weight, place.stored_shape, having, parameters, warn)
        if found is not None and place.kind != "stack":
            measured.append((place, found.folder))
    for message in warned.values():
        yield Finding(level="hint", what=message, remedy="Give mergekit-ace moments prompts of it, if it has some.")
    having_some = {place.weight for place, _ in measured}
    yield from estimated([place.weight for place in asking if place.weight not in having_some], len(asking))
    for place, folder in sampled(measured):
        weight = merge.base_weight(place)
        if weight is not None:
            folder.require_weight(place.weight, weight)
        elif model_name(folder.index.base) != model_name(request.base_name):
            yield Finding(
                level="warning",
                what=f"the moments in {folder.folder} were measured on {folder.index.base}; the base of the recipe is "
                f"{request.base_name}, whose weights are not on this machine to be compared",
                remedy="Measure the moments with this recipe, unless both are the same model.",
            )
            return
