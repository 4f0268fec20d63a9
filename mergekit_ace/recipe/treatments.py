"""The treatment that a planned tensor gets from the method of its recipe."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_ace.methods.layerwise import LayerwiseMethod
from mergekit_ace.methods.tensors.output_head import heads_of
from mergekit_ace.recipe.plan import PlannedTensor
from mergekit_ace.tensor_treatment import Treatment


def treated(method: LayerwiseMethod, tensor: PlannedTensor, shape: Sequence[int]) -> Treatment:
    """As `LayerwiseMethod.treat`.

    Args:
        method: of the recipe.
        tensor: planned.
        shape: as stored.
    """
    heads = heads_of([tensor.base, *tensor.experts])
    return method.treat(tensor.name, shape, tensor.vocabulary_axis, tensor.shared_parameters, heads=heads)
