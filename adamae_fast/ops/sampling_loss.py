"""Teach the sampler where reconstruction fails: a REINFORCE loss on masked tokens (paper eq. 5, with its logarithm).

    loss[b] = - mean over masked i of  log p[b, i] · error[b, i],      p = softmax(logits), clamped to [eps, 1 - eps]
    gradient[b, j] = p_j · Σw - w_j,                     w_i = error_i / M where p_i is not clamped, else 0
    backward: grad_logits[b, j] = grad[b] · gradient[b, j]

The forward has everything that the gradient is made of, so it gives both and the backward is one multiplication.

eps is 1.1920929e-07, the spacing of fp32 numbers at 1, in every dtype: the clamp is part of the loss that published
checkpoints were trained with (there it comes from the fp32 categorical distribution), not a guard of the arithmetic.

Letters: B clips, N tokens, M masked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd.function import once_differentiable

from adamae_fast.ops.registry import (
    Impl,
    accumulate_dtype,
    check_ascending_ids,
    check_floating,
    check_ids,
    check_same_device,
    choose,
    describe,
    names_wrong_types,
    register,
    register_autograd,
)

PROBABILITY_EPS = 1.1920929e-07
"""Probabilities are clamped to [eps, 1 - eps] before the logarithm."""

_SCHEMA = "sampling_loss(Tensor logits, Tensor masked_ids, Tensor error) -> (Tensor loss, Tensor gradient)"


def _reference(logits_BN: Tensor, masked_ids_BM: Tensor, error_BM: Tensor) -> tuple[Tensor, Tensor]:
    check_ascending_ids("masked_ids", masked_ids_BM, logits_BN.shape[1])
    p_BN = torch.softmax(logits_BN, dim=1, dtype=accumulate_dtype(logits_BN.dtype))
    p_BM = p_BN.gather(1, masked_ids_BM)
    error_BM = error_BM.to(p_BN.dtype)
    loss_B = -(p_BM.clamp(PROBABILITY_EPS, 1 - PROBABILITY_EPS).log() * error_BM).mean(dim=1)
    clamped_BM = (p_BM < PROBABILITY_EPS) | (p_BM > 1 - PROBABILITY_EPS)
    weight_BM = (error_BM / masked_ids_BM.shape[1]).masked_fill(clamped_BM, 0)
    weight_BN = torch.zeros_like(p_BN).scatter_(1, masked_ids_BM, weight_BM)
    return loss_B, (p_BN * weight_BM.sum(dim=1, keepdim=True) - weight_BN).contiguous()


def _fake(logits_BN: Tensor, masked_ids_BM: Tensor, error_BM: Tensor) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(logits_BN.dtype)
    batch_size = logits_BN.shape[0]
    return logits_BN.new_empty((batch_size,), dtype=dtype), logits_BN.new_empty(logits_BN.shape, dtype=dtype)


_sampling_loss = register(_SCHEMA, reference=_reference, fake=_fake)


class _SamplingLoss(torch.autograd.Function):
    """Keeps the gradient and none of its inputs."""

    @staticmethod
    def forward(
        ctx: Any, overload: OpOverload, logits_BN: Tensor, masked_ids_BM: Tensor, error_BM: Tensor
    ) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            loss_B, gradient_BN = overload(logits_BN, masked_ids_BM, error_BM)
        ctx.save_for_backward(gradient_BN)
        ctx.mark_non_differentiable(gradient_BN)
        ctx.dtype = logits_BN.dtype
        return loss_B, gradient_BN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_B: Tensor, _: Tensor) -> tuple[None, Tensor, None, None]:
        (gradient_BN,) = ctx.saved_tensors
        return None, (grad_B.unsqueeze(1) * gradient_BN).to(ctx.dtype), None, None


register_autograd(_sampling_loss, _SamplingLoss)


@names_wrong_types
def sampling_loss(logits_BN: Tensor, masked_ids_BM: Tensor, error_BM: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Return the sampling loss of each clip, (B,) in fp32 (fp64 for fp64 logits); its mean over B is the paper's L_S.

    ``masked_ids_BM`` (int64) ascend within a clip; ``error_BM`` is the reconstruction error of those tokens, a constant
    here. The gradient goes to ``logits_BN`` only, in their dtype, and is zero through clamped probabilities; it is
    rounded once. Autograd keeps (B, N) numbers of the loss's dtype. Deterministic, differentiable once.

    Raises ValueError if shapes, dtypes or devices disagree, no token is masked, ``impl`` cannot run here, or, for
    ids on the CPU, one is out of range or does not ascend.
    """
    check_floating("logits", logits_BN, (None, None), "BN")
    check_ids("masked_ids", masked_ids_BM, logits_BN.shape[0], logits_BN.device)
    if masked_ids_BM.shape[1] == 0:
        raise ValueError(f"masked_ids has {describe(masked_ids_BM)}; the loss is a mean over at least one masked token")
    check_floating("error", error_BM, tuple(masked_ids_BM.shape), "BM")
    check_same_device("error", error_BM, logits_BN.device)
    error_BM = error_BM.detach() if error_BM.requires_grad else error_BM
    loss_B: Tensor = choose(_sampling_loss, impl, logits_BN.device)(logits_BN, masked_ids_BM, error_BM)[0]
    return loss_B
