"""The light decoder: sees all tokens, predicts the pixels of the masked ones."""

from __future__ import annotations

from torch import Tensor, nn

from adamae_fast.model.block import Block, init_linears
from adamae_fast.model.sizes import TransformerSize


class Decoder(nn.Module):
    """Blocks over all N tokens; LayerNorm and Linear(E, P) on the last M of them, the masked ones."""

    def __init__(self, size: TransformerSize, pixels_per_token: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(size.width, size.num_heads) for _ in range(size.depth)))
        self.norm = nn.LayerNorm(size.width, eps=1e-6)
        self.head = nn.Linear(size.width, pixels_per_token)
        init_linears(self)

    def forward(self, tokens_BNE: Tensor, num_masked: int) -> Tensor:
        """Return predictions (B, M, P) for the last ``num_masked`` tokens."""
        num_visible = tokens_BNE.shape[1] - num_masked
        hidden_BNE = self.blocks(tokens_BNE)
        return self.head(self.norm(hidden_BNE[:, num_visible:]))
