"""The pre-norm transformer block that encoder, decoder and sampler share.

Shapes: B clips, N tokens, D width, H heads, d channels of a head.
"""

from __future__ import annotations

from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adamae_fast.config import Recompute
from adamae_fast.model.layers import Dropout, DropPath, LayerNorm, norm_linear, norm_mlp
from adamae_fast.ops.attention import attention, choose_attention
from adamae_fast.ops.attention_backends import AttentionProblem

MLP_RATIO = 4


class Attention(nn.Module):
    """Multi-head self-attention; q and v may have a bias, k never has one (it would cancel in the softmax).

    In training mode it computes with ``backend`` (:func:`adamae_fast.ops.attention.attention`) and no other. Otherwise
    it takes what fits: pictures and exports run in fp32 and on any machine, which few back ends do.
    """

    def __init__(self, width: int, num_heads: int, *, qv_bias: bool, backend: str = "auto") -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width={width} is not a multiple of num_heads={num_heads}; change one of them")
        self.num_heads = num_heads
        self.backend = backend
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
        backend = self.backend if self.training else "auto"
        return self.proj(attention(q_BNHd, k_BNHd, v_BNHd, backend=backend).flatten(2))


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
    fc1         6  nor fc1's: it is computed again, a third of the linear layers' forward
    block       2  nor q, k, v and the attention's result: the two x alone
    =========  ==  =============================================================================================

    Beside them: statistics of each token (two of each LayerNorm, one of each head), and with dropout, which is in no
    part that is computed again, two bytes for each token and channel. Policies change no bit of a result on the CPU.
    torch.compile follows them with ``torch._functorch.config.cse`` off: by default it finds that something is computed
    twice, and keeps it.
    """

    recompute: Recompute = "none"

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        qv_bias: bool = True,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-6,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width, eps=norm_eps)
        self.attention = Attention(width, num_heads, qv_bias=qv_bias, backend=backend)
        self.norm2 = LayerNorm(width, eps=norm_eps)
        self.mlp = Mlp(width)
        self.dropout = Dropout(dropout)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x_BND: Tensor) -> Tensor:
        """Return tokens of the same shape."""
        x_BND = x_BND + self.drop_path(self.dropout(self._attention(x_BND)))
        return x_BND + self.drop_path(self.dropout(self._mlp(x_BND)))

    def _attention(self, x_BND: Tensor) -> Tensor:
        if self.recompute == "none":
            return self._plain_attention(x_BND)
        if self.recompute == "block":
            # No random number is drawn inside, so no generator's state has to be kept.
            return checkpoint(self._plain_attention, x_BND, use_reentrant=False, preserve_rng_state=False)
        qkv_BN3D = norm_linear(x_BND, self.norm1, self.attention.qkv.weight, self.attention.qkv_bias())
        return self.attention.attend(qkv_BN3D)

    def _plain_attention(self, x_BND: Tensor) -> Tensor:
        return self.attention(self.norm1(x_BND))

    def _mlp(self, x_BND: Tensor) -> Tensor:
        if self.recompute == "none":
            return self.mlp(self.norm2(x_BND))
        return norm_mlp(x_BND, self.norm2, self.mlp.fc1, self.mlp.fc2, keep_hidden=self.recompute == "pointwise")


def set_recompute(model: nn.Module, policy: Recompute) -> None:
    """Give every block below ``model`` the policy. Raises ValueError for a name that is none."""
    if policy not in get_args(Recompute):
        raise ValueError(f"recompute={policy!r}: choose one of {', '.join(get_args(Recompute))}")
    for module in model.modules():
        if isinstance(module, Block):
            module.recompute = policy


def chosen_backend(
    part: str, module: nn.Module | None, num_tokens: int, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Return the attention back end that training of ``module`` takes for ``num_tokens``, with products in ``dtype``.

    None where there is no attention: the sampler that is an MLP, or none at all. Raises ValueError that names the key
    ``model.attention.{part}`` and each reason if the one that it asks for cannot run there.
    """
    layer = next((m for m in module.modules() if isinstance(m, Attention)), None) if module else None
    if layer is None:
        return None
    problem = AttentionProblem(device, dtype, num_tokens, layer.proj.in_features // layer.num_heads, needs_grad=True)
    name, reasons = choose_attention(problem, layer.backend)
    if name is None:
        raise ValueError(f"model.attention.{part}={layer.backend!r} cannot take {problem}: {reasons}; choose auto")
    return name


def init_linears(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every Linear below ``module`` (LayerNorm starts at 1 and 0)."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
