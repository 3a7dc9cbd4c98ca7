"""The pre-norm transformer block that encoder, decoder and sampler share.

Shapes: B clips, N tokens, D width, H heads, d channels of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adamae_fast.ops.attention import attention

MLP_RATIO = 4


class Attention(nn.Module):
    """Multi-head self-attention; q and v may have a bias, k never has one (it would cancel in the softmax).

    In training mode it computes with ``backend`` (:func:`adamae_fast.ops.attention.attention`) and no other. Otherwise
    it takes what fits: pictures and exports run in fp32 and on any machine, which few back ends do.
    """

    def __init__(self, width: int, num_heads: int, *, qv_bias: bool, dropout: float, backend: str = "auto") -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width={width} is not a multiple of num_heads={num_heads}; change one of them")
        self.num_heads = num_heads
        self.backend = backend
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width)) if qv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(width)) if qv_bias else None
        self.proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Return softmax(q kᵀ / √d) v, projected; same shape as ``x_BND``."""
        bias = None
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        qkv = F.linear(x_BND, self.qkv.weight, bias)
        q_BNHd, k_BNHd, v_BNHd = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        backend = self.backend if self.training else "auto"
        out_BND = attention(q_BNHd, k_BNHd, v_BNHd, backend=backend).flatten(2)
        return self.dropout(self.proj(out_BND))


class Mlp(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, width: int, *, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, MLP_RATIO * width)
        self.fc2 = nn.Linear(MLP_RATIO * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Return fc2(GELU(fc1(x))); same shape as ``x_BND``."""
        return self.dropout(self.fc2(F.gelu(self.fc1(x_BND))))


class Block(nn.Module):
    """x + Attention(LayerNorm(x)), then x + Mlp(LayerNorm(x))."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        qv_bias: bool = True,
        dropout: float = 0.0,
        norm_eps: float = 1e-6,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attention = Attention(width, num_heads, qv_bias=qv_bias, dropout=dropout, backend=backend)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = Mlp(width, dropout=dropout)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Return tokens of the same shape."""
        x_BND = x_BND + self.attention(self.norm1(x_BND))
        return x_BND + self.mlp(self.norm2(x_BND))


def init_linears(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every Linear below ``module`` (LayerNorm starts at 1 and 0)."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
