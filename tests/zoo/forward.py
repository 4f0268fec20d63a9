"""One forward pass of a merged model, loaded as a user would load it."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.checkpoints import Family


def load_and_run(family: Family, folder: Path) -> PreTrainedModel:
    """Load the folder with the family's class, demand that nothing was missing, and that the outputs are finite."""
    model, info = type(family.build()).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"], f"missing from the output: {sorted(info['missing_keys'])[:5]}"
    assert not info["unexpected_keys"], f"unknown to the model: {sorted(info['unexpected_keys'])[:5]}"
    with torch.no_grad():
        outputs = model.eval()(**family.inputs())
    tensors = list(_floating(outputs.to_tuple()))
    assert tensors
    assert all(bool(tensor.isfinite().all()) for tensor in tensors)
    return model


def _floating(value: object) -> Iterator[Tensor]:
    """The floating tensors anywhere in the tuples of a model's output."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _floating(item)
