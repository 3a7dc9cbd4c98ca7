"""The normalised pixels of every token from the uint8 clip, in one launch.

    pixels[b, n, (c, t, h, w)] = (v / 255 - mean_c) / std_c = v · scale_c + shift_c

with scale and shift worked out in fp64 by the launcher. A program takes one colour of a few neighbouring tokens: it
reads whole rows of their patches and writes unbroken runs. The clip's sizes are constants of the compiled kernel, since
divisions by anything else would take longer than moving the bytes.

Bytes: B·C·T·H·W·(1 + e) with e bytes of an element of the result, which is the minimum.

Letters: B clips, C channels, T frames, H, W pixels, N tokens, P pixels a token; S = t · h · w, pixels of one colour.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adamae_kernels.launch import Table, choose

LAUNCH: Table = ((512, {"TOKENS": 4, "num_warps": 4}), (4096, {"TOKENS": 1, "num_warps": 4}))
"""By S. Tokens of one program."""


@triton.jit
def _kernel(
    video,
    out,
    scale_0,
    scale_1,
    scale_2,
    shift_0,
    shift_1,
    shift_2,
    T: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    TUBELET: tl.constexpr,
    PATCH: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    S: tl.constexpr = TUBELET * PATCH * PATCH
    columns: tl.constexpr = W // PATCH
    rows: tl.constexpr = H // PATCH
    N: tl.constexpr = T // TUBELET * rows * columns
    groups: tl.constexpr = (N + TOKENS - 1) // TOKENS
    clip = (tl.program_id(0) // (groups * 3)).to(tl.int64)
    group = tl.program_id(0) % groups
    # Colours are the outer loop: neighbouring programs read neighbouring patches, which share memory sectors.
    colour = tl.program_id(0) // groups % 3
    token_G = group * TOKENS + tl.arange(0, TOKENS)
    frame_G = (token_G // (rows * columns) * TUBELET).to(tl.int64)
    y_G = token_G // columns % rows * PATCH
    x_G = token_G % columns * PATCH
    corner_G = (frame_G * H + y_G) * W + x_G

    offset_S = tl.arange(0, BLOCK_S)
    t_S = (offset_S // (PATCH * PATCH)).to(tl.int64)
    inside_S = (t_S * H + offset_S // PATCH % PATCH) * W + offset_S % PATCH
    in_range = (token_G < N)[:, None] & (offset_S < S)[None, :]
    plane = video + (clip * 3 + colour) * T * H * W
    pixels = tl.load(plane + corner_G[:, None] + inside_S[None, :], mask=in_range, other=0).to(tl.float32)

    scale = tl.where(colour == 0, scale_0, tl.where(colour == 1, scale_1, scale_2))
    shift = tl.where(colour == 0, shift_0, tl.where(colour == 1, shift_1, shift_2))
    to = out + ((clip * N + token_G) * 3 + colour)[:, None] * S + offset_S[None, :]
    tl.store(to, (pixels * scale + shift).to(out.dtype.element_ty), mask=in_range)


def patchify(
    video_BCTHW: Tensor, tubelet_size: int, patch_size: int, mean: list[float], std: list[float], dtype: torch.dtype
) -> Tensor:
    """Return the normalised pixels (B, N, P) of a uint8 RGB clip in ``dtype``, fp16, bf16 or fp32.

    Arithmetic fp32, rounded once. Deterministic.
    """
    batch_size, _, num_frames, height, width = video_BCTHW.shape
    num_tokens = (num_frames // tubelet_size) * (height // patch_size) * (width // patch_size)
    per_colour = tubelet_size * patch_size**2
    out_BNP = video_BCTHW.new_empty((batch_size, num_tokens, 3 * per_colour), dtype=dtype)
    settings = choose(LAUNCH, per_colour)
    if out_BNP.numel():
        _kernel[(batch_size * 3 * triton.cdiv(num_tokens, settings["TOKENS"]),)](
            video_BCTHW.contiguous(),
            out_BNP,
            *(1 / (255 * s) for s in std),
            *(-m / s for m, s in zip(mean, std, strict=True)),
            T=num_frames,
            H=height,
            W=width,
            TUBELET=tubelet_size,
            PATCH=patch_size,
            BLOCK_S=triton.next_power_of_2(per_colour),
            **settings,
        )
    return out_BNP
