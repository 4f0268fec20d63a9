"""Every merge method of this package."""

from mergekit.merge_methods.base import MergeMethod

from mergekit_ace.methods.ace import Ace

METHODS: tuple[MergeMethod, ...] = (Ace(),)
"""Every method, in the order in which they are listed to people."""
