"""The pre-norm transformer block that encoder, decoder and sampler share.

Shapes: B clips, N tokens, D width, H heads, d channels of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adamae_fast.config import Recompute
from adamae_fast.model.layers import Dropout, LayerNorm, norm_linear, norm_mlp
from adamae_fast.ops.attention import attention

MLP_RATIO = 4


class Attention(nn.Module):
    """Multi-head self-attention; q and v may have a bias, k never has one (it would cancel in the softmax)."""

    def __init__(self, width: int, num_heads: int, *, qv_bias: bool) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width={width} is not a multiple of num_heads={num_heads}; change one of them")
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width)) if qv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(width)) if qv_bias else None
        self.proj = nn.Linear(width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Return softmax(q kᵀ / √d) v, projected; same shape as ``x_BND``."""
        return self.attend(F.linear(x_BND, self.qkv.weight, self.qkv_bias()))

    def qkv_bias(self) -> Tensor | None:
        """Return the bias of q, k and v together, (3 D,), or None."""
        if self.q_bias is None or self.v_bias is None:
            return None
        return torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))

    def attend(self, qkv_BN3D: Tensor) -> Tensor:
        """Return softmax(q kᵀ / √d) v of given q, k and v, projected."""
        q_BNHd, k_BNHd, v_BNHd = qkv_BN3D.unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        return self.proj(attention(q_BNHd, k_BNHd, v_BNHd).flatten(2))


class Mlp(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, MLP_RATIO * width)
        self.fc2 = nn.Linear(MLP_RATIO * width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Return fc2(GELU(fc1(x))); same shape as ``x_BND``."""
        return self.fc2(F.gelu(self.fc1(x_BND)))


class Block(nn.Module):
    """x + Attention(LayerNorm(x)), then x + Mlp(LayerNorm(x)).

    What the backward keeps of a block, in elements for each token and channel, follows from ``recompute``:

    =========  ==  =============================================================================================
    none       16  x, LayerNorm(x), q, k, v, the attention's result; x, LayerNorm(x), fc1's result (4), GELU's (4)
    pointwise  10  neither LayerNorm's results nor GELU's: they are computed again
    fc1         6  nor fc1's: it is computed again, a fifth more products of the linear layers' forward
    block       2  nor q, k, v and the attention's result: the two x alone
    =========  ==  =============================================================================================

    Beside them: three or four statistics of a token (of its LayerNorms, and of its attention for each head), and with
    dropout, which is in no part that is computed again, two bytes for each token and channel.
    """

    recompute: Recompute = "none"

    def __init__(
        self, width: int, num_heads: int, *, qv_bias: bool = True, dropout: float = 0.0, norm_eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width, eps=norm_eps)
        self.attention = Attention(width, num_heads, qv_bias=qv_bias)
        self.norm2 = LayerNorm(width, eps=norm_eps)
        self.mlp = Mlp(width)
        self.dropout = Dropout(dropout)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Return tokens of the same shape."""
        x_BND = x_BND + self.dropout(self._attention(x_BND))
        return x_BND + self.dropout(self._mlp(x_BND))

    def _attention(self, x_BND: Tensor) -> Tensor:
        if self.recompute == "none":
            return self.attention(self.norm1(x_BND))
        if self.recompute == "block":
            # No random number is drawn inside, so no generator's state has to be kept.
            return checkpoint(self._attention_anew, x_BND, use_reentrant=False, preserve_rng_state=False)
        qkv_BN3D = norm_linear(x_BND, self.norm1, self.attention.qkv.weight, self.attention.qkv_bias())
        return self.attention.attend(qkv_BN3D)

    def _attention_anew(self, x_BND: Tensor) -> Tensor:
        return self.attention(self.norm1(x_BND))

    def _mlp(self, x_BND: Tensor) -> Tensor:
        if self.recompute == "none":
            return self.mlp(self.norm2(x_BND))
        return norm_mlp(x_BND, self.norm2, self.mlp.fc1, self.mlp.fc2, keep_hidden=self.recompute == "pointwise")


def init_linears(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every Linear below ``module`` (LayerNorm starts at 1 and 0)."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
