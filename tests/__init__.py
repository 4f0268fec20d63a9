"""Tests of mergekit-ace; a package, so that tests share `tests.reference` and `tests.checkpoints`."""
