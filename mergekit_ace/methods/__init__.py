"""mergekit's merge methods of this package: one file each, listed in `catalogue`."""

import sys

# Before any module of this package: the import of mergekit ends in the startup hook, and that imports ours. Were one of
# them to start mergekit's import, the hook would find it half imported. An import that is under way is not waited for:
# it may be that of another thread, whose hook waits for this package.
if "mergekit.merge_methods" not in sys.modules:
    import mergekit.merge_methods  # noqa: F401

from mergekit_ace.methods.catalogue import METHODS

__all__ = ["METHODS"]
