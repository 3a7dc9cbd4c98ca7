"""How long a training step takes on a GPU: a roofline *model*. Nothing here was measured.

A step is a list of parts, each limited by arithmetic or by memory, one after another:

* **products**: a linear layer from K to N channels over M tokens is the product M × K × N forward, M × N × K and
  K × M × N backward. One takes max(2 M K N / (product · e), 2 (M K + K N + M N) / copy) seconds. e is the best, over
  tile shapes, of the tile's own efficiency × the share of the last wave of tiles that is filled × the share of the
  tiles that is not padding.
* **attention**: 3.5 × the forward's 4 n² d operations at ``attention``; a quarter of it at the encoder's few tokens.
* **elementwise** (LayerNorm, GELU, residuals, with what a recompute reads again): 60 bytes a token and channel.
* **clips**: 6 bytes a pixel, and 8 bytes for each number of the decoder's result.
* **update**: 30 bytes a parameter.

Left out, as small: the layer between encoder and decoder, the sampler's last one, and the host, which a CUDA graph
takes away. :func:`step_seconds` gives the *fast* end; :data:`CAUTIOUS` says what the slow end assumes. A GPU's
attainable rates are the model's inputs, too; ``peak`` alone is the maker's figure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from adamae_fast.config import Recompute
from adamae_fast.model.sizes import TransformerSize
from adamae_fast.plan.work import Sizes

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """What the model knows of a GPU, in FLOP, bytes and seconds."""

    peak: float
    """Of dense bf16 products, as the maker states it."""
    product: float
    """What large bf16 products reach."""
    copy: float
    """What a copy in its memory reaches, read and written bytes together."""
    attention: float
    """What fused attention reaches, forward and backward, at 1568 tokens and heads of 64 channels."""
    multiprocessors: int
    memory: float
    """Bytes that CUDA reports."""
    decoders: int
    """NVDEC engines."""
    link: float
    """Bytes a second that a GPU sends over NVLink in a ring of all GPUs of a node."""
    network: float
    """Bytes a second that a usual node of eight sends to others: one adapter for each GPU."""


NETWORK_SHARE = 0.8
"""Of a link's stated rate that a collective reaches."""

GPUS = {
    "a100": Gpu(
        peak=312e12, product=250e12, copy=1.83e12, attention=158e12, multiprocessors=108, memory=79 * GIB, decoders=5,
        link=NETWORK_SHARE * 300e9, network=NETWORK_SHARE * 8 * 25e9,
    ),
    "h100": Gpu(
        peak=989e12, product=700e12, copy=3.00e12, attention=400e12, multiprocessors=132, memory=79 * GIB, decoders=7,
        link=NETWORK_SHARE * 450e9, network=NETWORK_SHARE * 8 * 50e9,
    ),
    "h200": Gpu(
        peak=989e12, product=790e12, copy=4.30e12, attention=400e12, multiprocessors=132, memory=139 * GIB, decoders=7,
        link=NETWORK_SHARE * 450e9, network=NETWORK_SHARE * 8 * 50e9,
    ),
}  # fmt: skip
"""The SXM cards, A100 and H100 with 80 GB: 8 × 200 Gbit/s Ethernet or InfiniBand a node with A100, 8 × 400 else."""

_TILES = ((256, 128, 1.0), (128, 128, 0.92), (128, 64, 0.75), (64, 64, 0.55))
"""Rows, columns and efficiency of the tiles that a product may be cut into."""

_SPLIT_WAVE = 0.8
"""Share of a wave that is filled where a product with few tiles is cut along its inner dimension."""

FORWARD_SHARE = 1 / 3
"""Of the time between two updates; the rest is the backward."""


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What sets the two ends of the model apart."""

    elementwise_bytes: float
    attention_share: float
    """Of the GPU's ``attention``."""
    factor: float
    """On the whole step."""


FAST = Assumptions(elementwise_bytes=60, attention_share=1.0, factor=1.0)
"""Every part as fast as the best known kernels."""

CAUTIOUS = Assumptions(elementwise_bytes=90, attention_share=0.75, factor=1.15)
"""Half as much elementwise traffic again, attention at three quarters of its rate, and 15 % for what is between."""


def gpu_named(device_name: str) -> str | None:
    """Key in :data:`GPUS` of a device as CUDA names it; None of another device."""
    return next((key for key in GPUS if key.upper() in device_name), None)


def product_seconds(gpu: Gpu, m: int, k: int, n: int, *, may_split: bool = False) -> float:
    """Time of an (m, k) × (k, n) product in 16 bits."""
    best = 0.0
    for rows, columns, efficiency in _TILES:
        down, across = math.ceil(m / rows), math.ceil(n / columns)
        waves = math.ceil(down * across / gpu.multiprocessors)
        filled = down * across / (waves * gpu.multiprocessors)
        if may_split and down * across < gpu.multiprocessors:
            filled = _SPLIT_WAVE
        padding = (m * n) / (down * rows * across * columns)
        best = max(best, efficiency * filled * padding)
    return max(2 * m * k * n / (gpu.product * best), 2 * (m * k + k * n + m * n) / gpu.copy)


def linear_seconds(gpu: Gpu, num_tokens: int, k: int, n: int, *, input_gradient: bool = True) -> float:
    """Forward and backward of a linear layer."""
    seconds = product_seconds(gpu, num_tokens, k, n) + product_seconds(gpu, k, num_tokens, n, may_split=True)
    return seconds + (product_seconds(gpu, num_tokens, n, k) if input_gradient else 0.0)


def attention_flops(size: TransformerSize, num_tokens: int) -> int:
    """Of the forward, all blocks together: q kᵀ and its product with v."""
    return size.depth * 4 * num_tokens**2 * size.width


def stack_seconds(gpu: Gpu, size: TransformerSize, batch_size: int, num_tokens: int) -> float:
    """Forward and backward of the linear layers of all blocks."""
    d, tokens = size.width, batch_size * num_tokens
    layers = ((d, 3 * d), (d, d), (d, 4 * d), (4 * d, d))
    return size.depth * sum(linear_seconds(gpu, tokens, k, n) for k, n in layers)


def again_seconds(
    gpu: Gpu, size: TransformerSize, batch_size: int, num_tokens: int, recompute: Recompute, attention: float
) -> float:
    """What the backward computes again, all blocks together; elementwise parts are in the elementwise traffic."""
    d, tokens = size.width, batch_size * num_tokens
    outputs = {"none": (), "pointwise": (), "fc1": (4 * d,), "block": (3 * d, d, 4 * d)}[recompute]
    seconds = size.depth * sum(product_seconds(gpu, tokens, d, n) for n in outputs)
    if recompute == "block":
        seconds += batch_size * attention_flops(size, num_tokens) / attention
    return seconds


def pass_parts(
    gpu: Gpu, sizes: Sizes, batch_size: int, recompute: Recompute = "none", assumptions: Assumptions = FAST
) -> dict[str, float]:
    """Seconds of forward and backward of a batch, by part; see the module."""
    b, n, d, e = batch_size, sizes.num_tokens, sizes.encoder.width, sizes.decoder.width
    attention = gpu.attention * assumptions.attention_share
    stacks = [(sizes.encoder, sizes.num_visible, attention / 4), (sizes.decoder, sizes.decoder_tokens, attention)]
    parts = {"tokenizer": linear_seconds(gpu, b * n, sizes.pixels_per_token, d, input_gradient=False)}
    parts["head"] = linear_seconds(gpu, b * sizes.num_decoded, e, sizes.pixels_per_token)
    if sizes.sampler is not None:
        stacks.append((sizes.sampler, n, attention))
    if sizes.has_sampler and (sizes.sampler is None or sizes.sampler.width != d):
        parts["sampler's first layer"] = linear_seconds(gpu, b * n, d, sizes.sampler.width if sizes.sampler else d)
    parts["linear layers"] = sum(stack_seconds(gpu, size, b, tokens) for size, tokens, _ in stacks)
    parts["attention"] = sum(3.5 * b * attention_flops(size, tokens) / rate for size, tokens, rate in stacks)
    parts["again"] = sum(again_seconds(gpu, size, b, tokens, recompute, rate) for size, tokens, rate in stacks)
    elements = sum(b * size.depth * tokens * size.width for size, tokens, _ in stacks)
    parts["elementwise"] = assumptions.elementwise_bytes * elements / gpu.copy
    parts["clips"] = b * (6 * sizes.pixels + 8 * sizes.num_decoded * e) / gpu.copy
    return {name: assumptions.factor * seconds for name, seconds in parts.items()}


def update_seconds(gpu: Gpu, num_parameters: float, assumptions: Assumptions = FAST) -> float:
    """Of a fused AdamW: fp32 parameters, gradients and moments read and written, gradients read once more."""
    return assumptions.factor * 30 * num_parameters / gpu.copy
