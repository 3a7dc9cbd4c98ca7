"""Frame masking: whole frames (tubelets of frames) are visible, all others masked."""

from __future__ import annotations

import torch
from torch import Tensor

from adamae_fast.grid import TokenGrid
from adamae_fast.masking.protocol import check_num_visible, draw_uniform
from adamae_fast.ops.sample_visible import TokenSplit, split_tokens


class FrameMask:
    """Masks int(ρ · frames) whole frames of tokens; the paper's 87.5 % leaves one of eight."""

    needs_logits = False

    def num_visible(self, grid: TokenGrid, ratio: float) -> int:
        """K = n · (frames − int(ρ · frames)) with n tokens per frame."""
        visible_frames = grid.shape[0] - int(ratio * grid.shape[0])
        return check_num_visible(visible_frames * grid.tokens_per_frame, "frame", grid, ratio)

    def __call__(self, grid: TokenGrid, ratio: float, seeds_B: Tensor, logits_BN: Tensor | None = None) -> TokenSplit:
        """Draw frames uniformly; logits are ignored."""
        num_frames = self.num_visible(grid, ratio) // grid.tokens_per_frame
        frames = draw_uniform(seeds_B, grid.shape[0], num_frames).visible_ids_BK
        places = torch.arange(grid.tokens_per_frame, device=seeds_B.device)
        visible_ids_BK = (frames[:, :, None] * grid.tokens_per_frame + places).flatten(1)
        return split_tokens(visible_ids_BK, grid.num_tokens)
