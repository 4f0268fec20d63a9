"""Literal versions of every method, written from the formulas alone.

Nothing here imports `mergekit_ace`. Each function follows its source step by step (explicit centering, general
inverse, full SVD) at whatever precision `dtype` asks for: float64 is what the package is held against, float32 is
what it must not be worse than.
"""

from tests.reference.ace import AceOptions, ace, heterogeneity
from tests.reference.ace_default import ace_default
from tests.reference.actmat import actmat
from tests.reference.cart import cart
from tests.reference.iso import iso_c, iso_cts
from tests.reference.tensors import Recipe, Treatment, merge_checkpoint, merge_tensor
from tests.reference.tsv import tsv_m
from tests.reference.wudi import wudi_adam, wudi_closed_form, wudi_flow

__all__ = [
    "AceOptions",
    "Recipe",
    "Treatment",
    "ace",
    "ace_default",
    "actmat",
    "cart",
    "heterogeneity",
    "iso_c",
    "iso_cts",
    "merge_checkpoint",
    "merge_tensor",
    "tsv_m",
    "wudi_adam",
    "wudi_closed_form",
    "wudi_flow",
]
