"""The adaptive token sampler (paper section 3.1, equations 2 and 3, appendix A.2): one logit for each token.

It sees the tokens plus a learned position table that starts at zero; the sinusoid of encoder and decoder is not added.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adamae_fast.config import SamplerConfig
from adamae_fast.model.block import Block, init_linears

NUM_HEADS = 8
"""Whatever the width, as published."""


class AttentionSampler(nn.Module):
    """Z = MHA(X); logits = Linear(Z), with ``depth`` transformer blocks of ``width`` channels."""

    def __init__(self, config: SamplerConfig, num_tokens: int, token_width: int) -> None:
        super().__init__()
        width = config.width or token_width
        self.positions = nn.Parameter(torch.zeros(1, num_tokens, token_width))
        self.projection = nn.Linear(token_width, width) if width != token_width else nn.Identity()
        # Blocks without q/v bias and with LayerNorm's default epsilon, unlike encoder and decoder: as published.
        self.blocks = nn.Sequential(
            *(
                Block(width, NUM_HEADS, qv_bias=False, dropout=config.dropout, norm_eps=1e-5)
                for _ in range(config.depth)
            )
        )
        self.head = nn.Linear(width, 1)
        init_linears(self)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        """Return logits (B, N); their softmax is the paper's P."""
        x_BND = self.projection(_with_positions(tokens_BND, self.positions))
        return _logits(self.head, self.blocks(x_BND))


class MlpSampler(nn.Module):
    """Linear(D, D), Linear(D, 1) on each token alone (Table 1(f), "MLP"): the paper's baseline that sees no context.

    Appendix A.2 names no activation between the two, so there is none.
    """

    def __init__(self, num_tokens: int, token_width: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(1, num_tokens, token_width))
        self.hidden = nn.Linear(token_width, token_width)
        self.head = nn.Linear(token_width, 1)
        init_linears(self)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        """Return logits (B, N)."""
        return _logits(self.head, self.hidden(_with_positions(tokens_BND, self.positions)))


def _with_positions(tokens_BND: Tensor, positions_1ND: Tensor) -> Tensor:
    """Tokens stay in their dtype: fp32 positions would make the blocks keep fp32 tokens under autocast."""
    return tokens_BND + positions_1ND.to(tokens_BND.dtype)


def _logits(head: nn.Linear, features_BND: Tensor) -> Tensor:
    """Apply the head in its own dtype, also under autocast: bf16 leaves 8 bits to tell 1568 probabilities apart.

    As a sum of products of two dtypes, which keeps the features as they are; a linear layer would keep fp32 copies.
    """
    with torch.autocast(features_BND.device.type, enabled=False):
        return (features_BND * head.weight[0]).sum(-1) + head.bias


def build_sampler(config: SamplerConfig, num_tokens: int, token_width: int) -> AttentionSampler | MlpSampler:
    """Return the network that ``model.sampler`` describes."""
    if config.kind == "mlp":
        return MlpSampler(num_tokens, token_width)
    return AttentionSampler(config, num_tokens, token_width)
