"""mergekit's merge methods of this package: one file each."""

# Before any module of this room: the import of mergekit ends in the startup hook, and that imports ours. Were one of
# them to start mergekit's import, the hook would find it half imported.
import mergekit.merge_methods  # noqa: F401

from mergekit_ace.methods.catalogue import METHODS

__all__ = ["METHODS"]
