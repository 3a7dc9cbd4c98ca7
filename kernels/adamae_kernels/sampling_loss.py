"""The sampling loss of a clip and its gradient, one program for each clip, one launch each way.

    loss[b] = - mean over masked i of  log clamp(p[b, i]) · error[b, i],      p = exp(logit - largest) / Σ
    grad_logits[b, j] = grad[b] · (p_j · Σw - w_j),        w_i = error_i / M where p_i is not clamped, else 0

Bytes, with e of a logit and f of an error: forward N·e + M·(8 + f) + 12 a clip, which is the minimum: the second look
at a clip's logits, at the masked ids, hits the cache. Backward 2·N·e + M·(8 + f), and M·e more in the cache.

An id out of range makes its clip's loss and gradient NaN and reads or writes nothing, so that it surfaces where the
loss is checked and not as a read-back in every step.

Letters: B clips, N tokens, M masked.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adamae_kernels.launch import Table, choose

LAUNCH: Table = ((2048, {"num_warps": 8}), (8192, {"num_warps": 16}))
"""By N. A clip lies in the registers of one program; more warps only where a thread would hold too many logits."""

_EPS = tl.constexpr(1.1920929e-07)


@triton.jit
def _masked_terms(logits, ids, error, offset_M, M, N, largest, total):
    """Id, validity, p and error of masked tokens ``offset_M``; beyond M, the error is 0."""
    in_range = offset_M < M
    id_M = tl.load(ids + offset_M, mask=in_range, other=0)
    valid = (id_M >= 0) & (id_M < N)
    logit_M = tl.load(logits + id_M, mask=in_range & valid, other=float("-inf")).to(tl.float32)
    error_M = tl.load(error + offset_M, mask=in_range, other=0.0).to(tl.float32)
    p_M = tl.div_rn(tl.exp(logit_M - largest), total)
    return id_M, in_range & valid, tl.where(valid, p_M, float("nan")), error_M


@triton.jit
def _forward_kernel(logits, ids, error, loss, normalizer, N, M, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    clip = tl.program_id(0).to(tl.int64)
    logits += clip * N
    offset_N = tl.arange(0, BLOCK_N)
    logit_N = tl.load(logits + offset_N, mask=offset_N < N, other=float("-inf")).to(tl.float32)
    largest = tl.max(logit_N, 0)
    total = tl.sum(tl.exp(logit_N - largest), 0)
    tl.store(normalizer + clip * 2, largest)
    tl.store(normalizer + clip * 2 + 1, total)

    offset_M = tl.arange(0, BLOCK_M)
    _, _, p_M, error_M = _masked_terms(logits, ids + clip * M, error + clip * M, offset_M, M, N, largest, total)
    # Comparisons, not min and max: those would turn a NaN into a bound.
    p_M = tl.where(p_M < _EPS, _EPS, tl.where(p_M > 1 - _EPS, 1 - _EPS, p_M))
    tl.store(loss + clip, tl.div_rn(-tl.sum(tl.log(p_M) * error_M, 0), M.to(tl.float32)))


@triton.jit
def _backward_kernel(
    grad, logits, ids, error, normalizer, grad_logits, N, M, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr
):
    clip = tl.program_id(0).to(tl.int64)
    logits += clip * N
    grad_logits += clip * N
    grad = tl.load(grad + clip).to(tl.float32)
    largest = tl.load(normalizer + clip * 2)
    total = tl.load(normalizer + clip * 2 + 1)

    offset_M = tl.arange(0, BLOCK_M)
    id_M, store_M, p_M, error_M = _masked_terms(
        logits, ids + clip * M, error + clip * M, offset_M, M, N, largest, total
    )
    clamped = (p_M < _EPS) | (p_M > 1 - _EPS)
    weight_M = tl.where(clamped, 0.0, tl.div_rn(error_M, M.to(tl.float32)))
    # An invalid id's p is NaN and must reach the whole clip; a valid one adds exactly 0.
    sum_w = tl.sum(weight_M + tl.where(p_M == p_M, 0.0, float("nan")), 0)

    offset_N = tl.arange(0, BLOCK_N)
    in_range = offset_N < N
    logit_N = tl.load(logits + offset_N, mask=in_range, other=float("-inf")).to(tl.float32)
    grad_N = tl.div_rn(tl.exp(logit_N - largest), total) * sum_w * grad
    tl.store(grad_logits + offset_N, grad_N.to(grad_logits.dtype.element_ty), mask=in_range)
    # Other threads of this program wrote the masked tokens' p · Σw; only after all of them may w be taken off.
    tl.debug_barrier()
    grad_M = (p_M * sum_w - weight_M) * grad
    tl.store(grad_logits + id_M, grad_M.to(grad_logits.dtype.element_ty), mask=store_M)


def _blocks(num_tokens: int, num_masked: int) -> dict[str, int]:
    blocks = {"BLOCK_N": triton.next_power_of_2(num_tokens), "BLOCK_M": triton.next_power_of_2(num_masked)}
    return blocks | dict(choose(LAUNCH, num_tokens))


def sampling_loss(logits_BN: Tensor, masked_ids_BM: Tensor, error_BM: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss (B,) and the normaliser (B, 2), largest logit and Σ exp(logit - largest), both fp32.

    Logits and error fp16, bf16 or fp32, ids int64; arithmetic fp32. Deterministic.
    """
    (batch_size, num_tokens), num_masked = logits_BN.shape, masked_ids_BM.shape[1]
    loss_B = logits_BN.new_empty((batch_size,), dtype=torch.float32)
    normalizer_B2 = logits_BN.new_empty((batch_size, 2), dtype=torch.float32)
    if batch_size:
        _forward_kernel[(batch_size,)](
            logits_BN.contiguous(),
            masked_ids_BM.contiguous(),
            error_BM.contiguous(),
            loss_B,
            normalizer_B2,
            num_tokens,
            num_masked,
            **_blocks(num_tokens, num_masked),
        )
    return loss_B, normalizer_B2


def sampling_loss_backward(
    grad_B: Tensor, logits_BN: Tensor, masked_ids_BM: Tensor, error_BM: Tensor, normalizer_B2: Tensor
) -> Tensor:
    """Return the logits' gradient (B, N) in their dtype; arithmetic fp32, rounded once. Deterministic."""
    (batch_size, num_tokens), num_masked = logits_BN.shape, masked_ids_BM.shape[1]
    grad_logits_BN = logits_BN.new_empty((batch_size, num_tokens))
    if batch_size:
        _backward_kernel[(batch_size,)](
            grad_B.contiguous(),
            logits_BN.contiguous(),
            masked_ids_BM.contiguous(),
            error_BM.contiguous(),
            normalizer_B2.contiguous(),
            grad_logits_BN,
            num_tokens,
            num_masked,
            **_blocks(num_tokens, num_masked),
        )
    return grad_logits_BN
