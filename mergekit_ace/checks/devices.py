"""The device that a merge is to run on, which need not be one of the machine that checks its recipe."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from mergekit.options import MergeOptions

from mergekit_ace.recipe.failures import RecipeError
from mergekit_ace.recipe.findings import Finding


def check_device(options: MergeOptions) -> Iterator[Finding]:
    """A device that this machine does not have, or that torch does not know."""
    try:
        torch.device(options.device or "cpu")
    except RuntimeError:
        yield Finding(
            level="error",
            what=f"--device must be a device of torch's, such as cuda, cuda:1 or cpu; got {options.device!r}",
            remedy="Correct the option.",
        )
        return
    if (missing := missing_device(options)) is not None:
        yield Finding(
            level="hint",
            what=f"this machine has no {missing}: the recipe was checked for one that has, and time was not estimated",
            remedy="Nothing to do, if the merge runs on another machine.",
        )


def require_device(options: MergeOptions) -> None:
    """Refuse to start a merge for a device that is not there.

    Raises:
        RecipeError: naming the option and the remedy.
    """
    if (missing := missing_device(options)) is not None:
        option = "--multi-gpu" if options.multi_gpu else "--cuda" if options.cuda else f"--device {options.device}"
        raise RecipeError(
            f"{option}: torch {torch.__version__} finds no {missing} on this machine. "
            "Leave the option out to merge on the CPU, or see mergekit-ace doctor"
        )


def missing_device(options: MergeOptions) -> str | None:
    """What the options ask for and torch does not find, in words; None where it is there."""
    name = options.device or "cpu"
    if name != "cpu":
        try:
            torch.empty(0, device=name)
        except Exception:  # assertions, runtime errors and others, by backend and build
            return f"device {name}"
    # `current_accelerator` names what torch was built for, whether this machine has one or not.
    if options.multi_gpu and not torch.accelerator.is_available():
        return "accelerator"
    return None
