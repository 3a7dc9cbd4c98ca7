"""Tube masking (VideoMAE): the same places are visible in every frame."""

from __future__ import annotations

import torch
from torch import Tensor

from adamae_fast.grid import TokenGrid
from adamae_fast.masking.protocol import check_num_visible, draw_uniform
from adamae_fast.ops.sample_visible import TokenSplit, split_tokens


class TubeMask:
    """Masks int(ρ · tokens per frame) places, the same in all frames."""

    needs_logits = False

    def num_visible(self, grid: TokenGrid, ratio: float) -> int:
        """K = frames · (n − int(ρ · n)) with n tokens per frame: VideoMAE counts what is masked, frame by frame."""
        visible_places = grid.tokens_per_frame - int(ratio * grid.tokens_per_frame)
        return check_num_visible(grid.shape[0] * visible_places, "tube", grid, ratio)

    def __call__(self, grid: TokenGrid, ratio: float, seeds_B: Tensor, logits_BN: Tensor | None = None) -> TokenSplit:
        """Draw places uniformly and keep them in every frame; logits are ignored."""
        frames = grid.shape[0]
        num_places = self.num_visible(grid, ratio) // frames
        places = draw_uniform(seeds_B, grid.tokens_per_frame, num_places).visible_ids_BK
        frame_starts = torch.arange(frames, device=seeds_B.device) * grid.tokens_per_frame
        visible_ids_BK = (frame_starts[None, :, None] + places[:, None, :]).flatten(1)
        return split_tokens(visible_ids_BK, grid.num_tokens)
