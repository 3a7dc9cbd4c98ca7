"""Adaptive masking (paper section 3.1): visible tokens are drawn from the sampler's categorical distribution."""

from __future__ import annotations

from torch import Tensor

from adamae_fast.grid import TokenGrid
from adamae_fast.masking.protocol import check_num_visible
from adamae_fast.ops.sample_visible import TokenSplit, sample_visible


class AdaptiveMask:
    """K = int(N · (1 − ρ)) tokens, without replacement, with probability softmax(logits). Random in eval mode too."""

    needs_logits = True

    def num_visible(self, grid: TokenGrid, ratio: float) -> int:
        """K = int(N · (1 − ρ)), rounded down: 0.90 of 1568 tokens leaves 156."""
        return check_num_visible(int(grid.num_tokens * (1 - ratio)), "adaptive", grid, ratio)

    def __call__(self, grid: TokenGrid, ratio: float, seeds_B: Tensor, logits_BN: Tensor | None = None) -> TokenSplit:
        """Draw ids by Gumbel top-K. Raises ValueError without logits."""
        if logits_BN is None:
            raise ValueError("logits_BN=None: adaptive masking draws from the sampler's logits; pass them")
        return sample_visible(logits_BN, seeds_B, self.num_visible(grid, ratio))
