"""The ViT encoder: sees the visible tokens only."""

from __future__ import annotations

from torch import Tensor, nn

from adamae_fast.model.block import Block, init_linears
from adamae_fast.model.layers import LayerNorm
from adamae_fast.model.sizes import TransformerSize


class Encoder(nn.Module):
    """Blocks, then LayerNorm."""

    def __init__(self, size: TransformerSize) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(size.width, size.num_heads) for _ in range(size.depth)))
        self.norm = LayerNorm(size.width, eps=1e-6)
        init_linears(self)

    def forward(self, visible_BKD: Tensor) -> Tensor:
        """Return features of the visible tokens, (B, K, D)."""
        return self.norm(self.blocks(visible_BKD))
