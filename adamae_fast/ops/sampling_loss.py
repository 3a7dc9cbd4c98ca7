"""Teach the sampler where reconstruction fails: a REINFORCE loss on masked tokens (paper eq. 5, with its logarithm).

    loss[b] = - mean over masked i of  log p[b, i] · error[b, i],      p = softmax(logits), clamped to [eps, 1 - eps]
    backward: grad_logits[b, j] = grad[b] · (p_j · Σw - w_j),        w_i = error_i / M where p_i is not clamped, else 0

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
    check_floating,
    check_id_range,
    check_ids,
    check_same_device,
    choose,
    describe,
    like,
    register,
    register_autograd,
)

PROBABILITY_EPS = 1.1920929e-07
"""Probabilities are clamped to [eps, 1 - eps] before the logarithm."""

# The normaliser is a pair for each clip, the largest logit and Σ exp(logit - largest), so that
# p = exp(logit - largest) / Σ has the digits of a softmax; the logarithm of Σ, or their sum, would lose some.
_SCHEMA = "sampling_loss(Tensor logits, Tensor masked_ids, Tensor error) -> (Tensor loss, Tensor normalizer)"
_BACKWARD_SCHEMA = (
    "sampling_loss_backward(Tensor grad, Tensor logits, Tensor masked_ids, Tensor error, Tensor normalizer) -> Tensor"
)


def _reference(logits_BN: Tensor, masked_ids_BM: Tensor, error_BM: Tensor) -> tuple[Tensor, Tensor]:
    check_id_range("masked_ids", masked_ids_BM, logits_BN.shape[1])
    logits_BN = logits_BN.to(accumulate_dtype(logits_BN.dtype))
    largest_B1 = logits_BN.amax(dim=1, keepdim=True)
    sum_B1 = (logits_BN - largest_B1).exp().sum(dim=1, keepdim=True)
    p_BM = (logits_BN.gather(1, masked_ids_BM) - largest_B1).exp() / sum_B1
    log_p_BM = p_BM.clamp(PROBABILITY_EPS, 1 - PROBABILITY_EPS).log()
    return -(log_p_BM * error_BM.to(logits_BN.dtype)).mean(dim=1), torch.cat([largest_B1, sum_B1], dim=1)


def _backward_reference(
    grad_B: Tensor, logits_BN: Tensor, masked_ids_BM: Tensor, error_BM: Tensor, normalizer_B2: Tensor
) -> Tensor:
    dtype = normalizer_B2.dtype
    largest_B1, sum_B1 = normalizer_B2.split(1, dim=1)
    p_BN = (logits_BN.to(dtype) - largest_B1).exp() / sum_B1
    p_BM = p_BN.gather(1, masked_ids_BM)
    clamped_BM = (p_BM < PROBABILITY_EPS) | (p_BM > 1 - PROBABILITY_EPS)
    weight_BM = (error_BM.to(dtype) / masked_ids_BM.shape[1]).masked_fill(clamped_BM, 0)
    weight_BN = torch.zeros_like(p_BN).scatter_(1, masked_ids_BM, weight_BM)
    grad_BN = p_BN * weight_BM.sum(dim=1, keepdim=True) - weight_BN
    return (grad_BN * grad_B.to(dtype).unsqueeze(1)).to(logits_BN.dtype).contiguous()


def _fake(logits_BN: Tensor, masked_ids_BM: Tensor, error_BM: Tensor) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(logits_BN.dtype)
    batch_size = logits_BN.shape[0]
    return logits_BN.new_empty((batch_size,), dtype=dtype), logits_BN.new_empty((batch_size, 2), dtype=dtype)


def _backward_fake(
    grad_B: Tensor, logits_BN: Tensor, masked_ids_BM: Tensor, error_BM: Tensor, normalizer_B2: Tensor
) -> Tensor:
    return logits_BN.new_empty(logits_BN.shape)


_sampling_loss = register(_SCHEMA, reference=_reference, fake=_fake)
_sampling_loss_backward = register(_BACKWARD_SCHEMA, reference=_backward_reference, fake=_backward_fake)


class _SamplingLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, overload: OpOverload, logits_BN: Tensor, masked_ids_BM: Tensor, error_BM: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.backward_operation = like(overload, _sampling_loss_backward)
        with torch._C._AutoDispatchBelowAutograd():
            loss_B, normalizer_B2 = overload(logits_BN, masked_ids_BM, error_BM)
        ctx.save_for_backward(logits_BN, masked_ids_BM, error_BM, normalizer_B2)
        ctx.mark_non_differentiable(normalizer_B2)
        return loss_B, normalizer_B2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_B: Tensor, _: Tensor) -> tuple[None, Tensor, None, None]:
        return None, ctx.backward_operation(grad_B, *ctx.saved_tensors), None, None


register_autograd(_sampling_loss, _SamplingLoss)


def sampling_loss(logits_BN: Tensor, masked_ids_BM: Tensor, error_BM: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Return the sampling loss of each clip, (B,) in fp32 (fp64 for fp64 logits); its mean over B is the paper's L_S.

    ``masked_ids_BM`` (int64) are distinct within a clip; ``error_BM`` is the reconstruction error of those tokens, a
    constant here. The gradient goes to ``logits_BN`` only, in their dtype, and is zero through clamped probabilities.
    Deterministic, differentiable once.

    Raises ValueError if shapes, dtypes or devices disagree, no token is masked, ``impl`` cannot run here, or, for
    ids on the CPU, one is out of range.
    """
    check_floating("logits", logits_BN, (None, None), "BN")
    check_ids("masked_ids", masked_ids_BM, logits_BN.shape[0], logits_BN.device)
    if masked_ids_BM.shape[1] == 0:
        raise ValueError(f"masked_ids has {describe(masked_ids_BM)}; the loss is a mean over at least one masked token")
    check_floating("error", error_BM, tuple(masked_ids_BM.shape), "BM")
    check_same_device("error", error_BM, logits_BN.device)
    loss_B: Tensor = choose(_sampling_loss, impl, logits_BN.device)(logits_BN, masked_ids_BM, error_BM.detach())[0]
    return loss_B
