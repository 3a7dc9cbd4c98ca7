"""What every masking strategy is: a rule for the number of visible tokens, and a draw of which ones."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from adamae_fast.grid import TokenGrid
from adamae_fast.ops.sample_visible import TokenSplit, sample_visible


class MaskStrategy(Protocol):
    """Splits the tokens of each clip into visible and masked ones."""

    @property
    def needs_logits(self) -> bool:
        """Whether the draw follows the sampler network's logits; without them the model builds no sampler."""

    def num_visible(self, grid: TokenGrid, ratio: float) -> int:
        """K: how many of a clip's N tokens stay visible at masking ratio ``ratio``. Each strategy states its rule."""

    def __call__(self, grid: TokenGrid, ratio: float, seeds_B: Tensor, logits_BN: Tensor | None = None) -> TokenSplit:
        """Draw visible (B, K) and masked (B, N − K) ids, both ascending, from ``seeds_B`` (int64) alone."""


def draw_uniform(seeds_B: Tensor, num_items: int, num_drawn: int) -> TokenSplit:
    """Draw ``num_drawn`` of ``num_items`` items uniformly without replacement, for each clip of the batch."""
    equal_BI = torch.zeros((seeds_B.shape[0], num_items), device=seeds_B.device)
    return sample_visible(equal_BI, seeds_B, num_drawn)._replace(statistics_B3=None)


def check_num_visible(num_visible: int, strategy: str, grid: TokenGrid, ratio: float) -> int:
    """Refuse a ratio that leaves nothing visible or nothing masked."""
    if not 0 < num_visible < grid.num_tokens:
        raise ValueError(
            f"mask.ratio={ratio}: mask.strategy={strategy} leaves {num_visible} of {grid.num_tokens} tokens "
            f"(grid {'×'.join(map(str, grid.shape))}) visible; choose a ratio that leaves some visible and some masked"
        )
    return num_visible
