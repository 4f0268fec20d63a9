"""Why a recipe cannot be planned, in messages for users."""

from __future__ import annotations

from mergekit_ace.damaged_files import READING, message_of

__all__ = ["READING", "RecipeError", "message_of"]


class RecipeError(Exception):
    """A recipe that mergekit cannot read or plan."""
