"""Width, depth and heads of encoder and decoder for each ``model.size``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TransformerSize:
    """One stack of blocks."""

    width: int
    depth: int
    num_heads: int


@dataclass(frozen=True)
class ModelSize:
    """Encoder and decoder of one named size. The sampler is as wide as the encoder unless configured otherwise."""

    encoder: TransformerSize
    decoder: TransformerSize


SIZES = {
    "pico": ModelSize(TransformerSize(64, 4, 4), TransformerSize(32, 2, 2)),
    "nano": ModelSize(TransformerSize(128, 4, 4), TransformerSize(64, 2, 2)),
    "small": ModelSize(TransformerSize(384, 12, 6), TransformerSize(192, 4, 3)),
    "base": ModelSize(TransformerSize(768, 12, 12), TransformerSize(384, 4, 6)),
    "large": ModelSize(TransformerSize(1024, 24, 16), TransformerSize(512, 4, 8)),
    "huge": ModelSize(TransformerSize(1280, 32, 16), TransformerSize(640, 4, 8)),
}
"""base is the paper's; huge is VideoMAE's; nano is for tests and the demo, pico for studies of many runs."""
