"""Every architecture family by name."""

from tests.checkpoints.decoders import DENSE, INFERRED, MIXTURES, STATE_SPACES
from tests.checkpoints.encoders import ENCODER_DECODERS, ENCODERS
from tests.checkpoints.family import Family
from tests.checkpoints.vision import MODULAR, VISION

FAMILIES: dict[str, Family] = {
    family.name: family
    for group in (DENSE, MIXTURES, STATE_SPACES, INFERRED, ENCODERS, ENCODER_DECODERS, VISION, MODULAR)
    for family in group
}
