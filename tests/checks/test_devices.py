"""Devices that are asked for and are not there."""

from __future__ import annotations

import pytest
import torch
from mergekit.options import MergeOptions

from mergekit_ace.checks.devices import missing_device, require_device
from mergekit_ace.recipe.failures import RecipeError


def test_an_accelerator_that_torch_was_built_for_is_not_one_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build for CUDA on a machine without a GPU; or a backend that a package registered."""
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    options = MergeOptions(device="cpu").model_copy(update={"multi_gpu": True})
    assert missing_device(options) == "accelerator"
    with pytest.raises(RecipeError, match=r"--multi-gpu: torch \S+ finds no accelerator on this machine"):
        require_device(options)


def test_the_cpu_is_there() -> None:
    assert missing_device(MergeOptions(device="cpu")) is None
    assert missing_device(MergeOptions()) is None
