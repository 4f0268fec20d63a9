"""Layer ranges of a recipe of slices, against the layers that the models have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mergekit.config import OutputSliceDefinition

from mergekit_ace.recipe.findings import Finding
from mergekit_ace.recipe.plan import Plan


def check_layers(plan: Plan) -> Iterator[Finding]:
    """Ranges that go beyond a model's last layer."""
    config = plan.recipe.config
    if config.slices:
        for name in plan.architecture.modules:
            yield from _check_slices(plan, name, config.slices, "slices")
    for name, module in (config.modules or {}).items():
        yield from _check_slices(plan, name, module.slices or [], f"modules.{name}.slices")


def _check_slices(plan: Plan, module: str, slices: Sequence[OutputSliceDefinition], where: str) -> Iterator[Finding]:
    architecture = plan.architecture.modules[module].architecture
    for index, part in enumerate(slices):
        for number, source in enumerate(part.sources):
            layers = architecture.num_layers(source.model.config(trust_remote_code=plan.options.trust_remote_code))
            if source.layer_range[1] > layers:
                yield Finding(
                    level="error",
                    what=f"{where}[{index}].sources[{number}]: layer_range must end at {layers}, the number of layers "
                    f"of {source.model}, or before; got {list(source.layer_range)}",
                    remedy="The end is the number after the last layer's, counted from 0.",
                )
