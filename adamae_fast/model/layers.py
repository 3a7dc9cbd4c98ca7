"""Layers of a block, and pairs of layers that keep less for the backward by computing some of it again.

Shapes: D channels; leading dimensions are any.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from adamae_fast.ops.registry import autocast_dtype, without_autocast


def _affine(norm: nn.LayerNorm, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Weight and bias for an input of ``dtype``.

    CUDA takes the input's dtype only, and its statistics are fp32 all the same. The CPU takes fp32 beside a shorter
    dtype, and then its statistics are fp32, too.
    """
    if device.type == "cuda":
        return norm.weight.to(dtype), norm.bias.to(dtype)
    return norm.weight, norm.bias


class LayerNorm(nn.LayerNorm):
    """LayerNorm in its input's dtype, statistics in fp32; so under autocast, too, where PyTorch's makes fp32 copies."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (x − mean) / √(variance + eps) · weight + bias over the last dimension, in the dtype of ``x``."""
        with without_autocast(x.device):
            return F.layer_norm(x, self.normalized_shape, *_affine(self, x.dtype, x.device), self.eps)


class Dropout(nn.Dropout):
    """Dropout that keeps one byte an element: PyTorch's own keeps a factor in the input's dtype on the CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` with a share p of its elements replaced by 0 and the others divided by 1 − p, in training."""
        return torch.native_dropout(x, self.p, True)[0] if self.training and self.p > 0 else x


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): leaves out a branch of the network for a share ``rate`` of the clips.

    What is left is divided by 1 − rate, so that its mean stays; each clip is kept or left out as a whole. The rate is a
    tensor: a compiler would otherwise make code of its own for each block.
    """

    keep: Tensor

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.register_buffer("keep", torch.tensor(1 - rate), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``, whose first dimension counts clips; in training with clips replaced by 0."""
        if not self.training:
            return x
        kept_B = torch.rand(len(x), device=x.device) < self.keep
        return x * (kept_B / self.keep).to(x.dtype).view(-1, *[1] * (x.ndim - 1))


_NO_GRADIENTS: tuple[Tensor | None, ...] = (None, None, None)
"""Of a LayerNorm's input, weight and bias, where none of them needs one."""


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2)


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        with without_autocast(x.device):
            normed, mean, rstd = torch.native_layer_norm(x, norm_weight.shape, norm_weight, norm_bias, eps)
            ctx.save_for_backward(x, mean, rstd, norm_weight, norm_bias, weight)
            ctx.eps = eps
            return F.linear(normed, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, norm_weight, norm_bias, weight = ctx.saved_tensors
        *needs_norm, _, needs_weight, needs_bias = ctx.needs_input_grad
        grads_norm, grad_weight = _NO_GRADIENTS, None
        with without_autocast(x.device):
            grad_rows = _rows(grad)
            if needs_weight:
                normed = torch.native_layer_norm(x, norm_weight.shape, norm_weight, norm_bias, ctx.eps)[0]
                grad_weight = grad_rows.T @ _rows(normed)
                del normed
            grad_bias = grad_rows.sum(0) if needs_bias else None
            if any(needs_norm):
                grad_normed = (grad_rows @ weight).view(x.shape)
                grads_norm = torch.ops.aten.native_layer_norm_backward(
                    grad_normed, x, norm_weight.shape, mean, rstd, norm_weight, norm_bias, needs_norm
                )
        return *grads_norm, None, grad_weight, grad_bias


class _NormMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        eps: float,
        weight1: Tensor,
        bias1: Tensor,
        weight2: Tensor,
        bias2: Tensor,
        keep_hidden: bool,
    ) -> Tensor:
        with without_autocast(x.device):
            normed, mean, rstd = torch.native_layer_norm(x, norm_weight.shape, norm_weight, norm_bias, eps)
            hidden = F.linear(normed, weight1, bias1)
            del normed
            kept = hidden if keep_hidden else None
            ctx.save_for_backward(x, mean, rstd, norm_weight, norm_bias, weight1, bias1, weight2, kept)
            ctx.eps = eps
            return F.linear(F.gelu(hidden), weight2, bias2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, norm_weight, norm_bias, weight1, bias1, weight2, hidden = ctx.saved_tensors
        *needs_norm, _, needs_weight1, needs_bias1, needs_weight2, needs_bias2, _ = ctx.needs_input_grad
        needs_hidden = any(needs_norm) or needs_weight1 or needs_bias1
        grads_norm, grad_weight1, grad_bias1, grad_weight2, normed = _NO_GRADIENTS, None, None, None, None
        with without_autocast(x.device):
            grad_rows = _rows(grad)
            grad_bias2 = grad_rows.sum(0) if needs_bias2 else None
            if needs_weight1 or (hidden is None and (needs_hidden or needs_weight2)):
                normed = torch.native_layer_norm(x, norm_weight.shape, norm_weight, norm_bias, ctx.eps)[0]
                if hidden is None:
                    hidden = F.linear(normed, weight1, bias1)
            if needs_weight2:
                grad_weight2 = grad_rows.T @ _rows(F.gelu(hidden))
            if needs_hidden:
                grad_hidden = (grad_rows @ weight2).view(hidden.shape)
                # In place: these are the largest tensors of a step's backward.
                torch.ops.aten.gelu_backward.grad_input(grad_hidden, hidden, grad_input=grad_hidden)
                del hidden
                grad_hidden_rows = _rows(grad_hidden)
                if needs_weight1 and normed is not None:
                    grad_weight1 = grad_hidden_rows.T @ _rows(normed)
                del normed
                grad_bias1 = grad_hidden_rows.sum(0) if needs_bias1 else None
                if any(needs_norm):
                    grad_normed = (grad_hidden_rows @ weight1).view(x.shape)
                    grads_norm = torch.ops.aten.native_layer_norm_backward(
                        grad_normed, x, norm_weight.shape, mean, rstd, norm_weight, norm_bias, needs_norm
                    )
        return *grads_norm, None, grad_weight1, grad_bias1, grad_weight2, grad_bias2, None


def norm_linear(x: Tensor, norm: nn.LayerNorm, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``linear(norm(x), weight, bias)``; the backward keeps ``x`` and normalises it once more.

    Kept for each token: D elements, where the two layers on their own keep 2 D, and two statistics. Products run in
    the dtype of ``x``, or in autocast's where autocast is on; gradients arrive in the inputs' own dtypes.
    Only gradients that are needed are computed. Differentiable once; the same operations as the two layers, so the
    same values bit by bit on the CPU.
    """
    dtype = autocast_dtype(x)
    norm_weight, norm_bias = _affine(norm, dtype, x.device)
    bias = None if bias is None else bias.to(dtype)
    result: Tensor = _NormLinear.apply(x.to(dtype), norm_weight, norm_bias, norm.eps, weight.to(dtype), bias)
    return result


def norm_mlp(x: Tensor, norm: nn.LayerNorm, fc1: nn.Linear, fc2: nn.Linear, *, keep_hidden: bool) -> Tensor:
    """Return ``fc2(GELU(fc1(norm(x))))``; the backward computes norm and GELU once more, and fc1 unless it is kept.

    Kept for each token: D elements, 5 D with ``keep_hidden`` (the input of GELU, if fc1 makes 4 D), where the layers
    on their own keep 10 D. Otherwise as :func:`norm_linear`.
    """
    dtype = autocast_dtype(x)
    linears = (p.to(dtype) for p in (fc1.weight, fc1.bias, fc2.weight, fc2.bias))
    result: Tensor = _NormMlp.apply(x.to(dtype), *_affine(norm, dtype, x.device), norm.eps, *linears, keep_hidden)
    return result
