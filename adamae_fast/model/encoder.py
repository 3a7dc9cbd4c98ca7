"""The ViT encoder: sees the visible tokens only, or, of a classifier, all of them."""

from __future__ import annotations

from torch import Tensor, nn

from adamae_fast.model.block import Block, init_linears
from adamae_fast.model.layers import LayerNorm
from adamae_fast.model.sizes import TransformerSize


class Encoder(nn.Module):
    """Blocks, then LayerNorm; a classifier's encoder has none (``norm``), and drops paths.

    ``drop_path`` is the last block's rate; block k of L has drop_path · k / (L − 1) (Huang et al. 2016, section 3).
    """

    def __init__(
        self, size: TransformerSize, backend: str = "auto", *, drop_path: float = 0.0, norm: bool = True
    ) -> None:
        super().__init__()
        rates = [drop_path * k / (size.depth - 1) for k in range(size.depth)]
        self.blocks = nn.Sequential(
            *(Block(size.width, size.num_heads, drop_path=rate, backend=backend) for rate in rates)
        )
        self.norm = LayerNorm(size.width, eps=1e-6) if norm else nn.Identity()
        init_linears(self)

    def forward(self, visible_BKD: Tensor) -> Tensor:
        """Return features of the visible tokens, (B, K, D)."""
        return self.norm(self.blocks(visible_BKD))
