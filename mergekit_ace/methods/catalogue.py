"""Every merge method of this package."""

from mergekit_ace.methods.ace import Ace
from mergekit_ace.methods.actmat import Actmat
from mergekit_ace.methods.cart import Cart
from mergekit_ace.methods.iso_c import IsoC
from mergekit_ace.methods.iso_cts import IsoCts
from mergekit_ace.methods.layerwise import LayerwiseMethod
from mergekit_ace.methods.tsv_m import TsvM
from mergekit_ace.methods.wudi import Wudi

METHODS: tuple[LayerwiseMethod, ...] = (Ace(), Actmat(), Wudi(), TsvM(), IsoC(), IsoCts(), Cart())
"""Every method, in the order in which they are listed to people."""
