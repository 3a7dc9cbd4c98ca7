"""Bytes that a training step keeps for its backward, and its arithmetic, from the configuration alone.

``tests/bench/test_predict.py`` compares the figures with what saved-tensor hooks count. In words, for one transformer
block of n tokens, width d and h heads, in elements:

16 n d (recompute none), 10 (pointwise), 6 (fc1) or 2 (block), and statistics of LayerNorms and attention.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cache

from adamae_fast.config import MaskConfig, ModelConfig, Precision, Recompute
from adamae_fast.grid import NUM_CHANNELS, TokenGrid
from adamae_fast.interop.keys import parameter_shapes
from adamae_fast.masking import STRATEGIES
from adamae_fast.model.sampler import NUM_HEADS
from adamae_fast.model.sizes import SIZES, TransformerSize

BLOCK_ELEMENTS: dict[Recompute, int] = {"none": 16, "pointwise": 10, "fc1": 6, "block": 2}
"""Kept by one block of ours for each token and channel."""

FP32, INT64 = 4, 8


@dataclass(frozen=True)
class Sizes:
    """What all predictions follow from."""

    num_tokens: int
    num_visible: int
    encoder: TransformerSize
    decoder: TransformerSize
    sampler: TransformerSize | None
    """None: no sampler, or one without attention."""
    has_sampler: bool
    dropout: bool
    pixels_per_token: int
    keep_ratio: float

    @property
    def num_masked(self) -> int:
        """M."""
        return self.num_tokens - self.num_visible

    @property
    def num_decoded(self) -> int:
        """Masked tokens that training decodes and compares."""
        return max(1, round(self.keep_ratio * self.num_masked))

    @property
    def decoder_tokens(self) -> int:
        """Tokens that the decoder sees."""
        return self.num_visible + self.num_decoded

    @property
    def pixels(self) -> int:
        """Numbers in a clip."""
        return self.num_tokens * self.pixels_per_token


def grid_of(model: ModelConfig) -> TokenGrid:
    """How a clip is cut into tokens."""
    return TokenGrid(
        num_frames=model.num_frames,
        frame_size=model.frame_size,
        tubelet_size=model.tubelet_size,
        patch_size=model.patch_size,
    )


def sizes_of(model: ModelConfig, mask: MaskConfig) -> Sizes:
    """Read the sizes out of the configuration."""
    grid = grid_of(model)
    strategy, size = STRATEGIES[mask.strategy], SIZES[model.size]
    decoder = TransformerSize(size.decoder.width, model.decoder.depth or size.decoder.depth, size.decoder.num_heads)
    sampler = None
    if strategy.needs_logits and model.sampler.kind == "attention":
        sampler = TransformerSize(model.sampler.width or size.encoder.width, model.sampler.depth, NUM_HEADS)
    return Sizes(
        num_tokens=grid.num_tokens,
        num_visible=strategy.num_visible(grid, mask.ratio),
        encoder=size.encoder,
        decoder=decoder,
        sampler=sampler,
        has_sampler=strategy.needs_logits,
        dropout=model.sampler.dropout > 0,
        pixels_per_token=NUM_CHANNELS * model.tubelet_size * model.patch_size**2,
        keep_ratio=model.decoder.keep_ratio,
    )


def kept_bytes(
    model: ModelConfig, mask: MaskConfig, recompute: Recompute, precision: Precision = "fp32"
) -> Counter[str]:
    """Ours, of one clip, by part; casts of parameters and :func:`kept_bytes_once` not counted."""
    s = sizes_of(model, mask)
    element = FP32 if precision == "fp32" else 2

    def blocks(size: TransformerSize, num_tokens: int, depth: int) -> int:
        statistics = 2 * FP32 if recompute == "block" else (4 + size.num_heads) * FP32
        per_token = BLOCK_ELEMENTS[recompute] * size.width * element + statistics
        return depth * num_tokens * per_token

    kept: Counter[str] = Counter()
    if s.has_sampler:
        width = s.sampler.width if s.sampler else s.encoder.width
        kept["sampler"] = s.num_tokens * width * element  # input of the last layer
        if s.sampler is None or width != s.encoder.width:
            kept["sampler"] += s.num_tokens * s.encoder.width * element  # input of the first linear layer
        if s.sampler is not None:
            kept["sampler"] += blocks(s.sampler, s.num_tokens, s.sampler.depth)
            kept["sampler"] += 2 * s.sampler.depth * s.num_tokens * width * s.dropout  # one byte an element
        kept["decoder"] += s.num_tokens * FP32  # gradient of the sampling loss
    kept["sampler"] += s.num_tokens * INT64  # slots
    kept["encoder"] += blocks(s.encoder, s.num_visible, s.encoder.depth)
    kept["encoder"] += s.num_visible * (2 * s.encoder.width * element + 2 * FP32)  # last LayerNorm, input and result
    kept["decoder"] += blocks(s.decoder, s.decoder_tokens, s.decoder.depth)
    kept["decoder"] += s.decoder_tokens * s.decoder.width * element + s.num_decoded * 2 * FP32  # last LayerNorm
    kept["decoder"] += s.num_decoded * s.decoder.width * FP32  # gradient of its result
    return kept


def kept_bytes_once(model: ModelConfig, mask: MaskConfig) -> int:
    """Ours, whatever the number of clips: gradients of the head, which its loss makes in the forward."""
    s = sizes_of(model, mask)
    return (s.decoder.width + 1) * s.pixels_per_token * FP32


@cache
def num_parameters(model: ModelConfig, mask: MaskConfig) -> int:
    """Of the whole network."""
    return sum(math.prod(shape) for shape in parameter_shapes(model, mask).values())


def clip_bytes(model: ModelConfig, mask: MaskConfig, recompute: Recompute) -> int:
    """Estimate of what one clip more adds to a GPU's allocated peak in bf16, without a graph's pool.

    The clip; what is kept; the buffers of one block's backward (16 bytes a token and channel of the decoder, once more
    all of a block where blocks are computed again).
    """
    s = sizes_of(model, mask)
    transient = 16 * s.decoder_tokens * s.decoder.width
    if recompute == "block":
        transient += 24 * s.num_tokens * s.encoder.width
    return kept_bytes(model, mask, recompute, "bf16").total() + s.pixels + transient


def device_bytes(model: ModelConfig, mask: MaskConfig, recompute: Recompute, batch_size: int) -> int:
    """Estimate of a GPU's allocated peak with our step in bf16: a single process, no graph.

    fp32 parameters, gradients and moments; their bf16 casts; and :func:`clip_bytes`.
    """
    fixed = num_parameters(model, mask) * (16 + 2) + kept_bytes_once(model, mask)
    return fixed + batch_size * clip_bytes(model, mask, recompute)


def step_flops(model: ModelConfig, mask: MaskConfig) -> int:
    """Floating-point operations of forward and backward of one clip, 2 for each multiply-add, nothing twice."""
    s = sizes_of(model, mask)

    def blocks(size: TransformerSize, n: int) -> int:
        return size.depth * (24 * size.width**2 * n + 4 * n**2 * size.width)

    n, d, e = s.num_tokens, s.encoder.width, s.decoder.width
    tokenizer = 2 * n * s.pixels_per_token * d
    forward = tokenizer + blocks(s.encoder, s.num_visible) + blocks(s.decoder, s.decoder_tokens)
    forward += 2 * s.num_visible * d * e + 2 * s.num_decoded * e * s.pixels_per_token
    if s.has_sampler:
        width = s.sampler.width if s.sampler else d
        forward += 2 * n * width
        if s.sampler is None or width != d:
            forward += 2 * n * d * width
        if s.sampler is not None:
            forward += blocks(s.sampler, n)
    return 3 * forward - tokenizer  # the clip gets no gradient


def classifier_flops(model: ModelConfig, num_classes: int) -> int:
    """The same of a classifier, whose blocks see all tokens."""
    size, grid = SIZES[model.size].encoder, grid_of(model)
    n, d = grid.num_tokens, size.width
    tokenizer = 2 * n * grid.pixels_per_token * d
    blocks = size.depth * (24 * d**2 * n + 4 * n**2 * d)
    return 3 * (tokenizer + blocks + 2 * d * num_classes) - tokenizer
