"""Lean and fast masked pre-training on video with adaptive masking (AdaMAE)."""

from adamae_fast.model.adamae import AdaMAE, AdaMAEOutput
from adamae_fast.version import __version__

__all__ = ["AdaMAE", "AdaMAEOutput", "__version__"]
