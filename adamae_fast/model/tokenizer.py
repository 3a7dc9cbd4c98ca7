"""From pixels to tokens: the strided 3-D convolution of the paper, computed as one matrix product."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from adamae_fast.grid import NUM_CHANNELS, TokenGrid
from adamae_fast.ops.patchify import embed_tubelets


class Tokenizer(nn.Module):
    """Linear map of each tubelet's ImageNet-normalised pixels to one token.

    Weight (D, C, t, p, p) and bias (D,) are a Conv3d's with kernel = stride = tubelet, and start as Conv3d's do.
    """

    def __init__(self, grid: TokenGrid, width: int) -> None:
        super().__init__()
        tubelet = (NUM_CHANNELS, grid.tubelet_size, grid.patch_size, grid.patch_size)
        self.weight = nn.Parameter(torch.empty(width, *tubelet))
        self.bias = nn.Parameter(torch.empty(width))
        bound = 1 / math.sqrt(grid.pixels_per_token)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, video_BCTHW: Tensor) -> Tensor:
        """Return tokens (B, N, D) of a uint8 video (B, 3, T, H, W)."""
        return embed_tubelets(video_BCTHW, self.weight, self.bias)
