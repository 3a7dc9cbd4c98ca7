"""Masking strategies by name; one file each, one protocol (:mod:`adamae_fast.masking.protocol`)."""

from adamae_fast.masking.adaptive import AdaptiveMask
from adamae_fast.masking.frame import FrameMask
from adamae_fast.masking.protocol import MaskStrategy
from adamae_fast.masking.random import RandomMask
from adamae_fast.masking.tube import TubeMask

STRATEGIES: dict[str, MaskStrategy] = {
    "adaptive": AdaptiveMask(),
    "random": RandomMask(),
    "tube": TubeMask(),
    "frame": FrameMask(),
}

__all__ = ["STRATEGIES", "AdaptiveMask", "FrameMask", "MaskStrategy", "RandomMask", "TubeMask"]
