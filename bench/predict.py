"""Bytes that the published code keeps for its backward, and the peak of a GPU; ours: :mod:`adamae_fast.plan.work`.

``tests/bench/test_predict.py`` compares both with what saved-tensor hooks count.
"""

from __future__ import annotations

from adamae_fast.config import MaskConfig, ModelConfig
from adamae_fast.model.sizes import TransformerSize
from adamae_fast.plan.hardware import GPUS, gpu_named
from adamae_fast.plan.work import FP32, INT64, sizes_of

PUBLISHED_BLOCK_ELEMENTS = 16
"""Kept by one block of the published code for each token and channel, beside its h n² softmax."""


def kept_bytes_published(model: ModelConfig, mask: MaskConfig) -> int:
    """The published code's, of one of at least two clips, in fp32 on the CPU (where dropout keeps fp32 factors)."""
    s = sizes_of(model, mask)

    def blocks(size: TransformerSize, num_tokens: int) -> int:
        elements = PUBLISHED_BLOCK_ELEMENTS * size.width + size.num_heads * num_tokens + 4
        return size.depth * num_tokens * elements * FP32

    kept = s.pixels * FP32  # the float clip
    if s.has_sampler:
        width = s.sampler.width if s.sampler else s.encoder.width
        kept += s.num_tokens * width * FP32
        if s.sampler is None or width != s.encoder.width:
            kept += s.num_tokens * s.encoder.width * FP32
        if s.sampler is not None:
            kept += blocks(s.sampler, s.num_tokens)
            kept += 2 * s.sampler.depth * s.num_tokens * width * FP32 * s.dropout
        # logits; p, and normalised, clamped, its logarithm; their indices and a mask of the clamped; the error
        kept += s.num_tokens * (5 * FP32 + INT64 + 1) + s.num_masked * FP32 + 2 * FP32
    kept += s.num_tokens  # boolean mask
    kept += blocks(s.encoder, s.num_visible) + s.num_visible * (2 * s.encoder.width + 2) * FP32
    kept += blocks(s.decoder, s.num_tokens) + s.num_tokens * s.decoder.width * FP32
    return kept + s.num_masked * (s.decoder.width + 2 + 2 * s.pixels_per_token) * FP32  # prediction and labels


def peak_flops(device_name: str) -> float | None:
    """FLOP a second of a known GPU in dense bf16 products, as the maker states them; None of another device."""
    gpu = gpu_named(device_name)
    return None if gpu is None else GPUS[gpu].peak
