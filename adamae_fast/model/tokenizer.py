"""From pixels to tokens: the strided 3-D convolution of the paper, computed as one matrix product."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adamae_fast.grid import NUM_CHANNELS, TokenGrid
from adamae_fast.ops.patchify import IMAGENET_MEAN, IMAGENET_STD, embed_tubelets, tubelet_view
from adamae_fast.ops.registry import autocast_dtype


class Tokenizer(nn.Module):
    """Linear map of each tubelet's ImageNet-normalised pixels to one token.

    Weight (D, C, t, p, p) and bias (D,) are a Conv3d's with kernel = stride = tubelet, and start as Conv3d's do.
    """

    def __init__(self, grid: TokenGrid, width: int) -> None:
        super().__init__()
        self.tubelet_size, self.patch_size = grid.tubelet_size, grid.patch_size
        tubelet = (NUM_CHANNELS, grid.tubelet_size, grid.patch_size, grid.patch_size)
        self.weight = nn.Parameter(torch.empty(width, *tubelet))
        self.bias = nn.Parameter(torch.empty(width))
        bound = 1 / math.sqrt(grid.pixels_per_token)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, video_BCTHW: Tensor) -> Tensor:
        """Return tokens (B, N, D) of a video (B, 3, T, H, W): uint8, or a floating type in [0, 1].

        The latter is what fine-tuning augments in; its pixels, float, are kept for the weight's gradient.
        """
        if not video_BCTHW.is_floating_point():
            return embed_tubelets(video_BCTHW, self.weight, self.bias)
        channels = tubelet_view(video_BCTHW.to(self.weight.dtype), self.tubelet_size, self.patch_size).unbind(4)
        pixels = [x.sub(m).div(s) for x, m, s in zip(channels, IMAGENET_MEAN, IMAGENET_STD, strict=True)]
        pixels_BNP = torch.stack(pixels, dim=4).flatten(4).flatten(1, 3)
        dtype = autocast_dtype(self.weight)
        return F.linear(pixels_BNP.to(dtype), self.weight.flatten(1).to(dtype), self.bias.to(dtype))
