"""The light decoder: sees all tokens, describes the masked ones."""

from __future__ import annotations

from torch import Tensor, nn

from adamae_fast.model.block import Block, init_linears
from adamae_fast.model.layers import LayerNorm
from adamae_fast.model.sizes import TransformerSize


class Decoder(nn.Module):
    """Blocks over all N tokens; LayerNorm on the last M of them, the masked ones.

    ``head``, Linear(E, P), makes pixels of the result; in training that happens inside the loss.
    """

    def __init__(self, size: TransformerSize, pixels_per_token: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(size.width, size.num_heads) for _ in range(size.depth)))
        self.norm = LayerNorm(size.width, eps=1e-6)
        self.head = nn.Linear(size.width, pixels_per_token)
        init_linears(self)

    def forward(self, tokens_BNE: Tensor, num_masked: int) -> Tensor:
        """Return normalised hidden states (B, M, E) of the last ``num_masked`` tokens."""
        num_visible = tokens_BNE.shape[1] - num_masked
        hidden_BNE = self.blocks(tokens_BNE)
        return self.norm(hidden_BNE[:, num_visible:])
