"""Random patch masking (MAE-ST): visible tokens are uniform over space and time."""

from __future__ import annotations

from torch import Tensor

from adamae_fast.grid import TokenGrid
from adamae_fast.masking.protocol import check_num_visible, draw_uniform
from adamae_fast.ops.sample_visible import TokenSplit


class RandomMask:
    """K = int(N · (1 − ρ)) tokens, each subset equally likely."""

    needs_logits = False

    def num_visible(self, grid: TokenGrid, ratio: float) -> int:
        """K = int(N · (1 − ρ)): the rule of MAE-ST and of adaptive masking, so that both see equally much."""
        return check_num_visible(int(grid.num_tokens * (1 - ratio)), "random", grid, ratio)

    def __call__(self, grid: TokenGrid, ratio: float, seeds_B: Tensor, logits_BN: Tensor | None = None) -> TokenSplit:
        """Draw ids uniformly; logits are ignored."""
        return draw_uniform(seeds_B, grid.num_tokens, self.num_visible(grid, ratio))
