"""A small suite of checkpoints, the command line in this process, and files as bytes."""

from tests.cli.conftest import invoke, recipe, suite

__all__ = ["invoke", "recipe", "suite"]
