"""Lean and fast masked pre-training on video with adaptive masking (AdaMAE)."""

from adamae_fast.interop.starting_point import load_encoder, open_encoder
from adamae_fast.model.adamae import AdaMAE, AdaMAEOutput
from adamae_fast.model.classifier import VideoClassifier
from adamae_fast.model.video_encoder import LoadedKeys, VideoEncoder
from adamae_fast.version import __version__

__all__ = [
    "AdaMAE",
    "AdaMAEOutput",
    "LoadedKeys",
    "VideoClassifier",
    "VideoEncoder",
    "__version__",
    "load_encoder",
    "open_encoder",
]
